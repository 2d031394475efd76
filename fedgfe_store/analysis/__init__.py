"""Numbers about embeddings: centroids, drift, distances and projections, in bounded memory.

Each function reads a selection once (`project` and `map_records` twice), a few records at a time,
and computes in float64. What stays in memory is its result.
"""

from fedgfe_store.analysis.centroids import centroids, combine
from fedgfe_store.analysis.distances import class_spread, distance_to_server, drift
from fedgfe_store.analysis.maps import RecordMap, map_records
from fedgfe_store.analysis.projection import project
from fedgfe_store.analysis.reference import nearest_classes, quality
from fedgfe_store.analysis.summary import summarize

__all__ = [
    "RecordMap",
    "centroids",
    "class_spread",
    "combine",
    "distance_to_server",
    "drift",
    "map_records",
    "nearest_classes",
    "project",
    "quality",
    "summarize",
]
