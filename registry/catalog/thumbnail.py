"""`thumbnail.create`: renders thumbnails of one version of an asset, from and to `JOBS_ASSETS`."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from job_registry import Cancel, JobContext, JobPolicy, JobType, Payload

MEMORY_LIMIT_MB: Final = 512
"""Memory for one job: the file, twice, and its decoded picture, or the picture and its thumbnail
while one becomes the other. The bounds in `_pictures.py` and `_picture_headers.py` respect it."""

# No separator, no leading dot, nothing that a path or a URL gives a meaning to.
AssetId = Annotated[
    str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")
]
VersionNumber = Annotated[int, Field(ge=1, le=2**31 - 1)]
Pixels = Annotated[int, Field(ge=1, le=8_192)]


class ThumbnailCreate(Payload):
    """Render thumbnails of one version of an asset, as WebP."""

    asset_id: AssetId = Field(description="The asset's folder.", examples=["sample"])
    version_number: VersionNumber = Field(
        description="Which version of the asset: the picture is {assetId}/{versionNumber}.*.",
        examples=[1],
    )
    sizes: Annotated[list[Pixels], Field(min_length=1, max_length=16)] = Field(
        default=[128, 512], description="The longest edge of each thumbnail, in pixels."
    )


class Thumbnail(BaseModel):
    """One thumbnail that was written: its path below the assets, its size, its bytes."""

    model_config = ConfigDict(frozen=True)

    path: str
    width: int
    height: int
    bytes: int


class ThumbnailResult(BaseModel):
    """The thumbnails of the job, in the order of its sizes."""

    model_config = ConfigDict(frozen=True)

    thumbnails: list[Thumbnail]


thumbnail_create = JobType(
    name="thumbnail.create",
    payload=ThumbnailCreate,
    policy=JobPolicy(max_attempts=3, timeout_seconds=300),
    # It computes, and it reads untrusted pictures with a library in C. In a process of its own, a
    # crash or an endless picture costs only that process, and jobs use all cores.
    run_in="process",
    memory_limit_mb=MEMORY_LIMIT_MB,
)


@thumbnail_create.handler
def render(job: JobContext, payload: ThumbnailCreate) -> ThumbnailResult:
    """Render each size: by the longest edge, never enlarged, turned as EXIF says."""
    # Imported here, so that `job-registry types` does not load an imaging library.
    from job_registry.asset_files import AssetFiles
    from job_registry.catalog._pictures import decode

    files = AssetFiles(job.assets, payload.asset_id, payload.version_number)
    source = decode(*files.read(), longest_edge=max(payload.sizes))
    thumbnails = []
    for done, size in enumerate(dict.fromkeys(payload.sizes), start=1):
        if job.cancel_requested:
            # Not Fail: when its worker stops, the job is to run again.
            raise Cancel("The job was cancelled before every size was rendered.")
        content, width, height = source.draw(size)
        path = files.write(f"{size}.webp", content)
        thumbnails.append(Thumbnail(path=path, width=width, height=height, bytes=len(content)))
        job.progress({"rendered": done, "of": len(payload.sizes)})
    return ThumbnailResult(thumbnails=thumbnails)
