"""The picture of all latents over HTTP: places as bytes, since a million of them as text would take seconds."""

import numpy as np
from fastapi import APIRouter, Response

from steer.browser.guard import Viewer
from steer.browser.lists import SourceName
from steer.browser.sources import Opened


def maps_router(opened: Opened) -> APIRouter:
    """The route of the map."""
    router = APIRouter(prefix="/api")

    @router.get("/map", response_class=Response)
    def places(account: Viewer, source: SourceName) -> Response:
        """x and y of each latent in order, in -1..1, as little-endian float32; then the density of each, likewise."""
        index = opened.source(source).index
        data = np.concatenate([index.map().ravel(), index.columns()["density"]]).astype("<f4").tobytes()
        how = {"x-saekit-map": str(index.info.get("map", "")), "cache-control": "private, max-age=600"}
        return Response(data, media_type="application/octet-stream", headers=how)

    return router
