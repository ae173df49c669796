"""PostgreSQL vacuums the queue's tables by what changed in them, not by how large they are.

By default it waits for a fifth of a table to change. With ten million finished jobs, that is two
million dead rows, and every claim and every page has to pass over those in its index. The settings
here are per table, so they take effect without a restart. Those that an operator has made are kept.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

additive = True

# Jobs are updated twice and deleted once. Each change is of a column in an index, so that no update
# can stay in its page (HOT) and a lower fillfactor would only make the table larger.
CHANGED: Final = {
    "autovacuum_vacuum_scale_factor": "0.01",
    "autovacuum_vacuum_threshold": "5000",
    "autovacuum_vacuum_insert_scale_factor": "0.05",
    "autovacuum_analyze_scale_factor": "0.02",
}
# Tables whose rows come and go: they stay small if their dead rows are removed soon.
TRANSIENT: Final = {
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "2000",
    "autovacuum_vacuum_cost_delay": "0",
}
SETTINGS: Final = {
    "job": CHANGED,
    "job_attempt": CHANGED,
    "job_count": TRANSIENT,
    "job_event_batch": TRANSIENT,
}


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for table, settings in SETTINGS.items():
            own = _options(table)
            listed = [f"{name} = {value}" for name, value in settings.items() if name not in own]
            if listed:
                op.execute(f"ALTER TABLE {table} SET ({', '.join(listed)})")


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for table, settings in SETTINGS.items():
            op.execute(f"ALTER TABLE {table} RESET ({', '.join(settings)})")


def _options(table: str) -> set[str]:
    """Return the names of the storage parameters that a table has."""
    query = sa.text("SELECT unnest(reloptions) FROM pg_class WHERE oid = to_regclass(:table)")
    found = op.get_bind().execute(query, {"table": table}).scalars()
    return {each.partition("=")[0] for each in found}
