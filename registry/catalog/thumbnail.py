"""`thumbnail.create`: renders thumbnails of one version of an asset, from and to `JOBS_ASSETS`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from job_registry import Cancel, JobContext, JobPolicy, JobType, Payload

if TYPE_CHECKING:
    from PIL import Image

    from job_registry.catalog._thumbnail_files import ThumbnailFiles

MAX_PIXELS = 100_000_000
"""Pictures with more pixels than this are refused unread: a small file can hold terabytes."""

# No separator, no leading dot, nothing that a path or a URL gives a meaning to.
AssetId = Annotated[
    str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")
]
Pixels = Annotated[int, Field(ge=1, le=8_192)]


class ThumbnailCreate(Payload):
    """Render thumbnails of one version of an asset, as WebP."""

    asset_id: AssetId = Field(description="The asset's folder.", examples=["sample"])
    version_number: Annotated[int, Field(ge=1, le=2**31 - 1)] = Field(
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
    # It computes, and it reads pictures of strangers with a library in C: a crash or a picture
    # that takes forever then costs one process, and every core renders.
    run_in="process",
)


@thumbnail_create.handler
def render(job: JobContext, payload: ThumbnailCreate) -> ThumbnailResult:
    """Renders each size: longest edge, never enlarged, turned as EXIF says, written whole."""
    # Here, because `job-registry types` should not pay for an imaging library.
    from job_registry.catalog._thumbnail_files import ThumbnailFiles

    files = ThumbnailFiles(job.assets, payload.asset_id, payload.version_number)
    picture = files.open_picture(max_pixels=MAX_PIXELS)
    thumbnails = []
    for done, size in enumerate(dict.fromkeys(payload.sizes), start=1):
        if job.cancel_requested:
            # Not Fail: when its worker stops, the job is to run again.
            raise Cancel("The job was cancelled before every size was rendered.")
        thumbnails.append(_render_size(files, picture, size))
        job.progress({"rendered": done, "of": len(payload.sizes)})
    return ThumbnailResult(thumbnails=thumbnails)


def _render_size(files: ThumbnailFiles, picture: Image.Image, size: int) -> Thumbnail:
    import io

    from PIL import Image

    copy = picture.copy()
    copy.thumbnail((size, size), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    copy.save(encoded, format="WEBP", quality=85, method=4)
    path = files.write(f"{size}.webp", encoded.getvalue())
    return Thumbnail(path=path, width=copy.width, height=copy.height, bytes=encoded.tell())
