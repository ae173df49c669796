"""The shop's own table. It is in the database of the queue, so that both share transactions."""

from __future__ import annotations

import os
from typing import Final
from uuid import UUID

from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_DRIVERS: Final = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}


class Base(DeclarativeBase):
    """The tables of the shop. Their migrations are the shop's, with Alembic for example."""


class Order(Base):
    """An order. It is `placed`, then `confirmed`, then `settled`."""

    __tablename__ = "shop_order"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    email: Mapped[str]
    cents: Mapped[int]
    status: Mapped[str]


def database_url() -> str:
    """Return `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/NAME`."""
    return os.environ.get("DATABASE_URL", "sqlite:///shop.db")


def create_engine() -> AsyncEngine:
    """Create the engine of one process, or of one event loop in it."""
    url = make_url(database_url())
    return create_async_engine(url.set(drivername=_DRIVERS[url.get_backend_name()]))
