"""Variants: a method with settings and a budget, and the fields of a request for it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ficoco_vllm.reduction import get
from ficoco_vllm.reduction.pipeline import PIPELINES

Site = Literal["tower", "decoder", "both"]
SITES: tuple[Site, ...] = ("tower", "decoder", "both")
# The method a server of each site is started with: settings of the server are those of this method, so none are given.
_SERVER_METHODS: Mapping[Site, str] = {"tower": "ficoco-v", "decoder": "ficoco-l", "both": "ficoco-vl"}
FULL = "full"
NO_IMAGE = "no image"


def site_of(method: str) -> Site:
    """Where a method reduces, and so which server can run it.

    Raises:
        ValueError: there is no such method.
    """
    if method in PIPELINES:
        return "both"
    return "decoder" if get(method).site == "decoder" else "tower"


def server_method(method: str | None, site: Site) -> str:
    """The method of a server that runs a method, or none, at its site; one that reduces twice runs no other one."""
    return method if method is not None and method in PIPELINES else _SERVER_METHODS[site]


@dataclass(frozen=True)
class Variant:
    """One way to answer.

    Attributes:
        label: label in tables, without the budget.
        method: a method of the registry, or None: all visual tokens (`FULL`) or no image at all (`NO_IMAGE`).
        keep: visual tokens left of an image, after the tower or in the decoder's last layer; None for all.
        settings: hyperparameters and exchanged stages that differ from the method's defaults.
    """

    label: str
    site: Site
    method: str | None = None
    keep: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A name that no other variant has: equal ways to answer share it, whatever their labels."""
        budget = () if self.keep is None else (str(self.keep),)
        return "/".join((self.served_name or self.label, self.site, *budget))

    @property
    def served_name(self) -> str | None:
        """The name under which a server knows the method: its own, or that of a method with these settings fixed."""
        if self.method is None or not self.settings:
            return self.method
        text = json.dumps([self.method, self.settings], sort_keys=True)
        return f"bench-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def with_image(self) -> bool:
        """Whether the image is sent."""
        return self.label != NO_IMAGE

    def fields(self) -> dict[str, Any]:
        """Fields of a request beyond OpenAI's (docs/serving.md)."""
        if not self.with_image:
            return {}
        if self.method is None:
            return {"ficoco": "off"}
        budget = {} if self.keep is None else {"keep": self.keep}
        return {"ficoco": {"method": self.served_name, **budget}}


def full(site: Site) -> Variant:
    """All visual tokens, through the server of a site."""
    return Variant(FULL, site)
