"""PostgreSQL as people have it compiles expensive statements, and the tests have such a server."""

from __future__ import annotations

from typing import Any

import asyncpg


async def fetch(url: str, sql: str) -> list[Any]:
    """Rows of a statement, on a connection that has the server's settings and none of ours."""
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(sql)]
    finally:
        await connection.close()


async def test_the_systems_postgresql_has_jit_and_it_is_on(debian_url: str) -> None:
    rows = await fetch(
        debian_url,
        "SELECT pg_jit_available(), current_setting('jit'),"
        " current_setting('jit_above_cost')::double precision",
    )
    assert rows == [(True, "on", 100_000.0)]


async def test_a_statement_of_a_high_estimated_cost_is_compiled(debian_url: str) -> None:
    # The estimate decides, whatever the statement really costs: each of these has no row, and
    # PostgreSQL takes 100 for granted.
    nothing = "(SELECT * FROM jsonb_to_recordset(jsonb '[]') AS each_row (n integer))"
    rows = await fetch(
        debian_url,
        f"EXPLAIN (ANALYZE) SELECT count(*) FROM {nothing} AS a, {nothing} AS b, {nothing} AS c,"
        f" {nothing} AS d WHERE a.n + b.n > c.n + d.n",
    )
    assert any("JIT:" in row[0] for row in rows), rows
