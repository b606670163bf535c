"""Certificate and key of the public port, read again when their files change."""

import asyncio
import logging
import ssl
from pathlib import Path

_log = logging.getLogger(__name__)
_LOOK_EVERY = 1.0


class CertificateError(Exception):
    """Certificate or key cannot be used; the message says why."""


class Certificate:
    """A TLS context that follows its files, as cert-manager or a Secret mount replaces them."""

    def __init__(self, certificate: str, key: str) -> None:
        """Read the files.

        Raises:
            CertificateError: they are missing, no PEM, or do not belong together.
        """
        self._certificate = certificate
        self._key = key
        self._timer: asyncio.TimerHandle | None = None
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        self._seen = self._stamp()
        try:
            self._load()
        except (OSError, ssl.SSLError) as error:
            raise CertificateError(
                f"cannot use --tls-cert-file {certificate} with --tls-key-file {key}: {error}"
            ) from None

    def _load(self) -> None:
        # First elsewhere: a certificate that does not fit its key would leave the context without a key. The empty
        # password lets an encrypted key fail instead of asking at the terminal.
        for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self.context):
            context.load_cert_chain(self._certificate, self._key, "")

    def _stamp(self) -> tuple[tuple[int, int], ...]:
        stamps = []
        for path in (self._certificate, self._key):
            try:
                told = Path(path).stat()
                stamps.append((told.st_mtime_ns, told.st_ino))
            except OSError:
                stamps.append((0, 0))
        return tuple(stamps)

    def follow(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look at the files now and then; connections that are open keep the certificate they began with."""
        self._timer = loop.call_later(_LOOK_EVERY, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        stamp = self._stamp()
        if stamp != self._seen:
            self._seen = stamp
            try:
                self._load()
                _log.info("tls=reloaded certificate=%s", self._certificate)
            except (OSError, ssl.SSLError) as error:
                _log.warning("tls=kept certificate=%s why=%s", self._certificate, error)
        self.follow(loop)

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
