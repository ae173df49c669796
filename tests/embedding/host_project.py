"""A host project, as it stands in a folder of its own: the files that a test writes.

Everything in it has the name that is used here too: the packages `api` and `registry`, a model
`Job` with the table `job`, and an environment of alembic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

FILES: Final = {
    "api/__init__.py": "",
    "registry/__init__.py": "",
    "registry/mail.py": '''
from job_registry import JobContext, JobType, Payload


class MailSend(Payload):
    """Send one mail."""

    to: str


mail_send = JobType(name="mail.send", payload=MailSend)


@mail_send.handler
async def send(job: JobContext, payload: MailSend) -> dict[str, str]:
    return {"sent": payload.to}
''',
    "api/models.py": '''
import os

from sqlmodel import Field, SQLModel


class Job(SQLModel, table=True):
    """A job that the host has found for someone."""

    __tablename__ = os.environ.get("JOB_TABLE", "job")

    id: int | None = Field(default=None, primary_key=True)
    title: str
''',
    "api/main.py": '''
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException
from job_registry_api import JobQueue, Worker, create_app, load_settings
from registry.mail import MailSend, mail_send
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlmodel import func, select

from api.models import Job

settings = load_settings()
engine = create_async_engine(os.environ["HOST_DATABASE"])
queue = JobQueue.from_settings(settings, [mail_send])
jobs = create_app(settings, queue=queue)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with queue, Worker(queue).running(), jobs.running():
        yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)
app.mount("/queue", jobs)


@app.post("/openings/{title}")
async def publish(title: str) -> dict[str, str]:
    """Store an opening, and the job that announces it, in one transaction."""
    async with AsyncSession(engine) as session, session.begin():
        session.add(Job(title=title))
        enqueued = await queue.enqueue(MailSend(to=f"{title}@example.com"), session=session)
        if title == "refused":
            raise HTTPException(409)
    return {"job": str(enqueued.job.id)}


@app.get("/openings")
async def count() -> int:
    async with AsyncSession(engine) as session:
        return (await session.scalars(select(func.count()).select_from(Job))).one()


@app.get("/results/{job_id}")
async def result(job_id: str) -> object:
    return await queue.result(job_id, timeout=20)
''',
    "alembic.ini": """
[alembic]
script_location = alembic
path_separator = os
prepend_sys_path = .
""",
    "alembic/script.py.mako": """
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None

import sqlalchemy as sa
import sqlmodel
from alembic import op


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
""",
    "alembic/env.py": """
import asyncio
import os

from alembic import context
from api import models
from job_registry_api import QUEUE_TABLES
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine

SHARES_A_FILE = os.environ["HOST_DATABASE"].startswith("sqlite")


def include_name(name: str | None, kind: str, parents: dict[str, str | None]) -> bool:
    return not (SHARES_A_FILE and kind == "table" and name in QUEUE_TABLES)


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=models.SQLModel.metadata,
        include_name=include_name,
    )
    with context.begin_transaction():
        context.run_migrations()


async def main() -> None:
    engine = create_async_engine(os.environ["HOST_DATABASE"])
    async with engine.begin() as connection:
        await connection.run_sync(run)
    await engine.dispose()


asyncio.run(main())
""",
}


def write_to(folder: Path) -> None:
    """Write the project."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip(), "utf-8")
    (folder / "alembic" / "versions").mkdir()
