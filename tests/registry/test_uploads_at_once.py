"""Pictures of several formats that are kept as one version at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from job_registry.asset_files import AssetFiles


class AtOnce(AssetFiles):
    """Looks for pictures when the other one does, the first two times."""

    together: threading.Barrier
    looks = 0

    def _sources(self) -> list[str]:
        self.looks += 1
        if self.looks > 2:
            return super()._sources()
        self.together.wait(20)
        found = super()._sources()
        self.together.wait(20)
        return found


def test_one_of_two_pictures_that_find_each_other_is_kept(tmp_path: Path) -> None:
    AtOnce.together = threading.Barrier(2)

    def keep(extension: str) -> bool:
        files = AtOnce(str(tmp_path), "cat", 1)
        incoming = files.begin()
        incoming.file.write(extension.encode())
        return files.keep(incoming, extension)

    with ThreadPoolExecutor(2) as threads:
        kept = dict(zip(("gif", "png"), threads.map(keep, ("gif", "png")), strict=True))
    assert sorted(kept.values()) == [False, True]
    (picture,) = (tmp_path / "cat").iterdir()
    assert kept[picture.suffix[1:]]
