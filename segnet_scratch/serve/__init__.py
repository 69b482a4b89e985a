"""segnet serve: a page on this machine that segments the photos that are dropped on it.

Three addresses: `/`, the page, one file without anything from elsewhere; `/model`, what the page must know;
`/segment`, which takes the bytes of a picture and answers with labels. Nothing of a request is written to a disk or
looked up there: a picture comes as the body of a request, without a name, and stays in memory.
"""

import logging
import re
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image

from segnet_scratch.data import read_image, resize_image, resize_mask
from segnet_scratch.data.drawing import Style, heat_colours, jpeg_uri, png_uri
from segnet_scratch.data.palette import has_background
from segnet_scratch.data.pictures import MAX_PIXELS, label_counts
from segnet_scratch.errors import ConfigError, SegnetError, require
from segnet_scratch.files import reason
from segnet_scratch.inference import Segmenter, scaled

MAX_BYTES = 32 << 20  # of a picture's file
LOOPBACK = ("127.0.0.1", "localhost")
_VIEW = 1600  # pixels of the longer side of what the page is sent

log = logging.getLogger(__name__)


def application(segmenter: Segmenter, style: Style, name: str, hosts: tuple[str, ...] | None = LOOPBACK) -> Any:
    """The WSGI application; `name` of the model is shown.

    hosts: the names by which it may be called, None for any. A page of another site whose name was made to lead here,
    or that sends pictures here, is refused. MissingLibraryError without Flask.
    """
    flask = require("flask", "serve", "segnet serve")
    failures = require("werkzeug.exceptions", "serve", "segnet serve")
    app = flask.Flask("segnet_scratch", static_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=MAX_BYTES, TRUSTED_HOSTS=hosts and list(hosts))
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": _policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }
    about = _about(segmenter, style, name)
    worker = ThreadPoolExecutor(1, "segnet")  # a network is for one thread at a time

    def segment() -> dict[str, Any]:
        if flask.request.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            flask.abort(403, "asked for by the page of another site")
        return worker.submit(segmented, segmenter, flask.request.get_data(cache=False)).result()

    def refuse(error: Exception) -> Any:
        if isinstance(error, SegnetError):
            return {"error": str(error)}, 422
        if isinstance(error, MemoryError):
            return {"error": "memory is too short for this picture; scale it down, or end other programs"}, 503
        if isinstance(error, failures.RequestEntityTooLarge):
            return {"error": f"the file has more than {MAX_BYTES >> 20} MiB; scale the picture down"}, 413
        if isinstance(error, failures.HTTPException):
            return {"error": error.description}, error.code
        log.error("a picture could not be segmented", exc_info=error)
        return {"error": "the program failed at this picture; the terminal where it runs says more"}, 500

    def guard(response: Any) -> Any:
        response.headers.update(headers)
        return response

    app.add_url_rule("/", "page", lambda: flask.Response(page, mimetype="text/html"))
    app.add_url_rule("/model", "model", lambda: about)
    app.add_url_rule("/segment", view_func=segment, methods=["POST"])
    app.register_error_handler(Exception, refuse)
    app.after_request(guard)
    return app


def serve(segmenter: Segmenter, style: Style, name: str, host: str, port: int, started: Callable[[str], None]) -> None:
    """Answers requests until Ctrl-C; `started` is told the address. ConfigError where it cannot be had."""
    waitress = require("waitress", "serve", "segnet serve")
    app = application(segmenter, style, name, LOOPBACK if host in LOOPBACK else None)
    # What overflows a buffer would go to temporary files.
    buffers = {"max_request_body_size": MAX_BYTES + 1, "inbuf_overflow": MAX_BYTES + 2, "outbuf_overflow": 1 << 30}
    try:
        server = waitress.create_server(app, host=host, port=port, connection_limit=20, ident=None, **buffers)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {reason(error)}; choose another port, or 0 for any") from error
    started(f"http://{host}:{server.effective_port}/")
    server.run()


def segmented(segmenter: Segmenter, content: bytes) -> dict[str, Any]:
    """What the page is told of a picture, given as the bytes of its file. DataError where it is none.

    Pictures are data URIs, of at most _VIEW pixels a side: `photo`, upright; `labels`, grey; `uncertainty`, coloured
    from 0 to `largest`, where there is one. `shares` are those of the classes in the whole picture.
    """
    begun, before = perf_counter(), segmenter.seconds
    image = read_image("picture", for_prediction=True, stream=BytesIO(content))
    found = segmenter(image)
    size = scaled(image.shape, min(1.0, _VIEW / max(image.shape[:2])))
    answer: dict[str, Any] = {
        "height": image.shape[0],
        "width": image.shape[1],
        "photo": jpeg_uri(resize_image(image, size)),
        "labels": png_uri(Image.fromarray(resize_mask(found.labels, size))),
        "shares": (label_counts(found.labels)[: segmenter.model.classes] / found.labels.size).tolist(),
        "network": segmenter.seconds - before,
    }
    if found.uncertainty is not None:
        largest = float(found.uncertainty.max())
        values = Image.fromarray(found.uncertainty).resize((size[1], size[0]), Image.Resampling.BILINEAR)
        picture = Image.fromarray(heat_colours(np.asarray(values) / (largest or 1)))
        answer |= {"uncertainty": png_uri(picture), "largest": largest}
    return answer | {"seconds": perf_counter() - begun}


def _about(segmenter: Segmenter, style: Style, name: str) -> dict[str, Any]:
    model = segmenter.model
    return {
        "name": name,
        "what": f"{model.architecture}, width {model.width:g}, {segmenter}, input {'x'.join(map(str, segmenter.size))}",
        "classes": list(style.names),
        "colours": style.palette[: len(style.names)].tolist(),
        "background": has_background(style.names),
        "opacity": style.opacity,
        "samples": segmenter.inference.samples,
        "heat": heat_colours(np.linspace(0, 1, 6)).tolist(),
        "bytes": MAX_BYTES,
        "pixels": MAX_PIXELS,
    }


def _policy(page: str) -> str:
    """Content-Security-Policy: the page's own script and style by their hashes, its own server, and nothing else."""
    hashes = []
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes.append(f"{tag}-src 'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'")
    rest = "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return f"default-src 'none'; {'; '.join(hashes)}; {rest}"
