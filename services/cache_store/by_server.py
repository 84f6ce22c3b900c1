"""The metrics of several servers of the store as those of one: each sample with the server's name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import Metric
from prometheus_client.registry import Collector


class ByServer(Collector):
    """What `collectors` collect, with the label `server`, their keys."""

    def __init__(self, collectors: Mapping[str, Collector]) -> None:
        self._collectors = collectors

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for server, collector in self._collectors.items():
            for family in collector.collect():
                merged = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    merged.add_sample(sample.name, {"server": server, **sample.labels}, sample.value)
        return families.values()
