"""The program behind `make run`: draws a sample picture, prints what to try, and serves.

Meanwhile `make` builds GraphiQL, unless it is up to date.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from rich.console import Console

from job_registry.asset_place import anchored, is_url
from job_registry_api.cli import main as jobs
from job_registry_api.cli.listening import listen
from job_registry_api.settings import SettingsInvalid, load_settings

CHECKOUT: Final = Path(__file__).resolve().parent.parent
BUILD: Final = """
exec 3<&0 </dev/null
(cat <&3; kill 0) &
exec 3<&- nice -n 19 make --silent api/web/dist/index.html
"""
"""Runs `make`, and ends the process group when the pipe on the standard input closes."""


def draw_sample(assets: str) -> None:
    """Draw `sample/1.png` into the folder of assets, unless it exists.

    Raises:
        OSError: the folder is not writable.
    """
    picture = Path(assets) / "sample" / "1.png"
    if picture.exists():
        return
    from PIL import Image, ImageDraw

    for folder in (Path(assets), picture.parent):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    image = Image.radial_gradient("L").resize((1600, 1000)).convert("RGB")
    canvas = ImageDraw.Draw(image)
    for step in range(12):
        left = 60 + step * 125
        color = (40 + step * 18, 120, 255 - step * 18)
        canvas.ellipse((left, 400, left + 200, 600), fill=color)
    canvas.text((60, 60), "Job Registry", fill="white", font_size=96)
    unfinished = picture.with_suffix(".part")
    unfinished.touch(0o600)
    image.save(unfinished, format="PNG")
    unfinished.replace(picture)


def what_to_try(host: str, port: int, assets: str) -> str:
    """Return the first commands to try."""
    request = {
        "query": "mutation ($input: EnqueueJobInput!) { enqueueJob(input: $input) { __typename"
        " ... on EnqueueJobSuccess { job { id status } } ... on Error { message } } }",
        "variables": {
            "input": {
                "type": "thumbnail.create",
                "payload": {"assetId": "sample", "versionNumber": 1},
            }
        },
    }
    shown = f"[{host}]" if ":" in host else host
    return f"""
In another terminal:

  curl http://{shown}:{port}/graphql -H 'content-type: application/json' -d '{json.dumps(request)}'

  ls {assets}/sample/1/        the thumbnails, a moment later

Or in a browser: http://{shown}:{port}/graphql
"""


@contextmanager
def building_graphiql() -> Iterator[None]:
    """Let `make` build GraphiQL beside the server, with the lowest priority.

    The build ends with this process, however that ends: the server may leave without cleaning up.
    """
    build = None
    with suppress(OSError):  # Without a shell nothing is built.
        build = subprocess.Popen(
            ["sh", "-c", BUILD], cwd=CHECKOUT, stdin=subprocess.PIPE, start_new_session=True
        )
    try:
        yield
    finally:
        if build is not None and build.stdin is not None:
            build.stdin.close()
            build.wait()


def main() -> None:
    """Draw the sample, print what to try, then run `job-registry serve`."""
    say = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False).print
    # `job-registry serve` prints the faults of the settings.
    with suppress(SettingsInvalid):
        settings = load_settings()
        # A taken port ends the program before it prints what to try.
        listen(settings.host, settings.port, "JOBS_PORT").close()
        # Not for a bucket, which is not ours to fill, nor for port 0, which is not known yet.
        if not is_url(settings.assets) and settings.port:
            try:
                draw_sample(anchored(settings.assets))
                say(what_to_try(settings.host, settings.port, settings.assets))
            except OSError as error:
                say(f"The sample picture cannot be drawn: {error.strerror}: {error.filename}")
    sys.argv[1:] = ["serve"]
    with building_graphiql():
        jobs()


if __name__ == "__main__":
    main()
