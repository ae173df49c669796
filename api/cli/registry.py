"""`job-registry types`, `policy` and `validate`: the job types, without a database."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from job_registry import JobRegistry, JobTypeNotFound, PayloadInvalid
from job_registry.errors import escaped
from job_registry_api.cli import startup
from job_registry_api.cli.output import AsJson, out, print_json, print_table, refuse, say
from job_registry_api.cli.payloads import File, TypeName, parse, read


def types(as_json: AsJson = False) -> None:
    """List the job types, with their policies."""
    registry = startup.read_registry(startup.read_settings())
    if as_json:
        print_json([_type_json(registry, name) for name in registry])
        return
    rows = []
    for name, job_type in registry.items():
        limit = job_type.policy.concurrency_limit
        rows.append(
            (
                name,
                str(job_type.policy.max_attempts),
                f"{job_type.policy.timeout_seconds} s",
                "no limit" if limit is None else str(limit),
                "here" if job_type.has_handler else "remote",
                escape(escaped(job_type.description.partition("\n")[0])),
            )
        )
    print_table(("type", "attempts", "timeout", "at once", "handler", "description"), rows)


def policy(type_name: TypeName, as_json: AsJson = False) -> None:
    """Show the policy of a job type."""
    registry = startup.read_registry(startup.read_settings())
    try:
        found = registry.policy(type_name)
    except JobTypeNotFound as unknown:
        refuse(unknown, as_json)
    if as_json:
        print_json(_policy_json(registry, type_name))
        return
    limit = "no limit" if found.concurrency_limit is None else found.concurrency_limit
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    table.add_row("maxAttempts", str(found.max_attempts), "runs in total")
    table.add_row("timeoutSeconds", str(found.timeout_seconds), "for one attempt")
    table.add_row("concurrencyLimit", str(limit), "at once, over all workers")
    table.add_row(
        "backoff",
        f"{found.backoff.base_seconds:g} s",
        f"doubling up to {found.backoff.cap_seconds:g} s, with half jitter",
    )
    kept = {"park": "keeps jobs that it cannot read", "fail": "fails jobs that it cannot read"}
    table.add_row("onMismatch", found.on_mismatch.upper(), kept[found.on_mismatch])
    memory = registry.get_type(type_name).memory_limit_mb
    if memory is not None:
        table.add_row("memoryLimitMb", str(memory), "for the handler's process")
    out.print(table)


def validate(type_name: TypeName, file: File, as_json: AsJson = False) -> None:
    """Check a payload against its job type, as enqueue does. Needs no database."""
    registry = startup.read_registry(startup.read_settings())
    try:
        registry.admit(type_name, parse(read(file), file))
    except (JobTypeNotFound, PayloadInvalid) as refusal:
        refuse(refusal, as_json)
    if as_json:
        print_json({"valid": True})
    else:
        say("valid")


def _type_json(registry: JobRegistry, name: str) -> dict[str, Any]:
    job_type = registry[name]
    return {
        "name": name,
        "description": job_type.description,
        "hasHandler": job_type.has_handler,
        "fingerprint": job_type.fingerprint,
        "formerNames": list(job_type.former_names),
        "memoryLimitMb": job_type.memory_limit_mb,
        "policy": _policy_json(registry, name),
        "payloadSchema": dict(job_type.payload_schema),
        "examplePayload": dict(job_type.example_payload),
    }


def _policy_json(registry: JobRegistry, name: str) -> dict[str, Any]:
    job_type = registry.get_type(name)
    return {"type": job_type.name, **job_type.policy.as_json()}
