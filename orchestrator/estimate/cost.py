"""Device hours, energy and money of a time; must not import torch."""

from __future__ import annotations

from orchestrator.config.base import Section
from orchestrator.config.cluster import HardwareConfig


class CostPlan(Section):
    """What a stage takes."""

    device_hours: float
    energy_kwh: float | None
    """At the boards' power under load; hosts, network and cooling come on top."""
    dollars: float | None
    """None where the site set no price."""


def cost_of(hardware: HardwareConfig, *, hours: float, devices: int) -> CostPlan:
    """The cost of so many hours on so many devices."""
    device_hours = hours * devices
    price = hardware.dollars_per_hour
    return CostPlan(
        device_hours=device_hours,
        energy_kwh=None if hardware.watts is None else device_hours * hardware.watts / 1000,
        dollars=None if price is None else device_hours * price,
    )
