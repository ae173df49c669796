"""Stand-ins for a mail service and a bank. Put the clients of yours in their place."""

from __future__ import annotations

import asyncio
import logging
from typing import ClassVar

log = logging.getLogger("shop.services")


class AddressUnknown(Exception):
    """Raised when there is no such mailbox."""


class Busy(Exception):
    """Raised when the service wants the request again, in so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"try again in {seconds:g} s")
        self.seconds = seconds


class MailService:
    """Refuses addresses that end with `.invalid`. Is busy once for each that starts with `busy`."""

    _was_busy: ClassVar[set[str]] = set()

    async def send(self, to: str, text: str) -> None:
        """Send one mail.

        Raises:
            AddressUnknown: there is no such mailbox.
            Busy: the service has too much to do.
        """
        await asyncio.sleep(0.1)
        if to.endswith(".invalid"):
            raise AddressUnknown(to)
        if to.startswith("busy") and to not in self._was_busy:
            self._was_busy.add(to)
            raise Busy(seconds=2)
        log.info("mail to %s: %s", to, text)


class Bank:
    """Pays each reference once, however often it is requested."""

    async def pay(self, reference: str, cents: int) -> str:
        """Pay, and return the number of the receipt."""
        await asyncio.sleep(0.1)
        log.info("%d cents for %s", cents, reference)
        return f"R-{reference[:8]}"
