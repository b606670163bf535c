"""What a request is recognised by."""

from pdrouter.policies.fbi_hash import fbi_hash


class RoutingKey:
    """What a request is recognised by: requests with equal `text` belong together.

    `source` says where the key was found, for the log: `header:x-session-id`, `body:user`, `request_hash`.
    """

    __slots__ = ("_place", "source", "text")

    def __init__(self, text: str, source: str, place: int = -1) -> None:
        """Prepare.

        Args:
            text: what is equal for requests that belong together.
            source: where it was found.
            place: its place on the ring, 64 bits evenly spread, where it is known; else it is hashed when asked for.
        """
        self.text = text
        self.source = source
        self._place = place

    @property
    def place(self) -> int:
        """The key's place on the ring; both roles use the same one."""
        if self._place < 0:
            self._place = fbi_hash(self.text)
        return self._place
