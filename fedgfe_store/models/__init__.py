"""Which image model, does it fit, where its weights lie; the calls of diffusers.

``families`` finds the model that is meant, in a folder (``files``) or on the hub (``hub``); a
``model`` is what is known of it before its weights are loaded, and ``flux`` and ``sd`` are its
families. ``fit`` says which offload mode and batch fit a device (``devices``), a ``placement`` is
what was decided. Pipelines are ``diffusers``' own, over ``loading``, ``offload`` and
``quantization``; ``tiny`` comes with the package.
"""
