"""Faults on request: what `POST /sim/fault` takes."""

from enum import StrEnum
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class FaultKind(StrEnum):
    """What can go wrong with an engine."""

    SLOW = "slow"  # every step lasts `factor` times as long, for `seconds` (0: until told otherwise)
    HANG = "hang"  # the engine core stands still; HTTP goes on
    REFUSE = "refuse"  # connections are refused and open ones reset, for `seconds`
    STATUS = "status"  # the next `count` generation requests are answered with `code`
    DIE_MID_STREAM = (
        "die_mid_stream"  # the next `count` answers break off after `after_tokens`; with `exit`, the process ends
    )
    EXPIRE_LEASES = "expire_leases"  # every lease of this engine ends now
    DROP_REMOTE_REQUEST_ID = "drop_remote_request_id"  # the next `count` tickets lack it
    LATE_ANSWER = "late_answer"  # whole answers go out `seconds` after the engine core has finished them
    EDGE = "edge"  # this engine no longer reaches the side channel at `host`:`port`, which takes it `seconds` to learn
    LINK = "link"  # reading KV lasts `factor` times as long
    ALLOCATE = "allocate"  # this process holds `bytes` more memory; above its limit, the system kills it
    NONE = "none"  # all faults end


class Fault(BaseModel):
    """One fault; fields that its kind does not use are ignored."""

    model_config = ConfigDict(extra="forbid")

    kind: FaultKind
    count: int = Field(1, ge=1)
    seconds: float = Field(0.0, ge=0)  # of an edge: 0 for as long as NIXL tries
    factor: float = Field(10.0, gt=0)
    code: int = Field(500, ge=400, le=599)
    after_tokens: int = Field(3, ge=0)
    exit: bool = False
    host: str = ""
    port: int = Field(5600, ge=1, le=65535)
    bytes: int = Field(0, ge=0, le=4 * 2**30)

    @model_validator(mode="after")
    def _names_its_edge(self) -> Self:
        if self.kind is FaultKind.EDGE and not self.host:
            raise ValueError("an edge needs the host of the remote side channel")
        return self
