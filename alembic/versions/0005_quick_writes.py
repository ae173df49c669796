"""Events of PostgreSQL's functions as arrays, and triggers of SQLite that run fewer statements.

What they do is as it was, so that processes of the previous release go on working. PostgreSQL's
functions are in `0005_quick_writes.sql`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

additive = True

INSERTED: Final = "CREATE TRIGGER job_count_inserted AFTER INSERT ON job"
UPDATED: Final = (
    "CREATE TRIGGER job_count_updated AFTER UPDATE OF status ON job WHEN OLD.status <> NEW.status"
)

MORE: Final = """
    UPDATE job_count SET jobs = jobs + 1 WHERE type = NEW.type AND status = NEW.status;
    INSERT INTO job_count (type, status, jobs) SELECT NEW.type, NEW.status, 1 WHERE changes() = 0;
"""
# A job that is there has been counted.
LESS: Final = """
    UPDATE job_count SET jobs = jobs - 1 WHERE type = OLD.type AND status = OLD.status;
"""

# Those of revision 0001.
FORMER: Final = """
    INSERT INTO job_count (type, status, jobs)
    SELECT {row}.type, {row}.status, 0 WHERE NOT EXISTS (
        SELECT 1 FROM job_count WHERE type = {row}.type AND status = {row}.status);
    UPDATE job_count SET jobs = jobs + {change}
    WHERE type = {row}.type AND status = {row}.status;
"""


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for function in _functions("0005_quick_writes.sql"):
            op.execute(sa.DDL(function.replace("%", "%%")))
    else:
        _replace_triggers(LESS, MORE)


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        changed = set(map(_name, _functions("0005_quick_writes.sql")))
        for function in _functions("0002_claims.sql"):
            if _name(function) in changed:
                former = function.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION", 1)
                op.execute(sa.DDL(former.replace("%", "%%")))
    else:
        _replace_triggers(FORMER.format(row="OLD", change=-1), FORMER.format(row="NEW", change=1))


def _replace_triggers(less: str, more: str) -> None:
    op.execute("DROP TRIGGER job_count_inserted")
    op.execute("DROP TRIGGER job_count_updated")
    op.execute(f"{INSERTED} BEGIN {more} END")
    op.execute(f"{UPDATED} BEGIN {less} {more} END")


def _functions(file: str) -> list[str]:
    text = Path(__file__).with_name(file).read_text("utf-8")
    return re.split(r"^(?=CREATE (?:OR REPLACE )?FUNCTION )", text, flags=re.MULTILINE)[1:]


def _name(function: str) -> str:
    return function.partition("FUNCTION ")[2].partition("(")[0]
