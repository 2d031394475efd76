"""The format: what lies in a store's folder, how it is read and how commits are made.

It knows of no record keys, selections or images, only of rows, chunks and files.
"""
