"""Compressed request bodies: what `Content-Encoding` says is undone, no further than a limit."""

from __future__ import annotations

import zlib

from cdm_serve.errors import BodyTooLarge, MalformedBody, UnsupportedMedia

WINDOWS = {"gzip": 31, "deflate": 15}
"""`Content-Encoding` → zlib's `wbits`. RFC 9110, section 8.4.1.2: deflate is a stream with zlib's own header."""


def decompressed(body: bytes, encoding: str, limit: int) -> bytes:
    """`body` as it was before it was compressed by `encoding` (none or `identity`: as it is).

    Raises:
        UnsupportedMedia: an encoding other than gzip and deflate.
        MalformedBody: the bytes are not one whole stream of that encoding.
        BodyTooLarge: there are more than `limit` bytes in it; no more than these are ever inflated.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in WINDOWS:
        raise UnsupportedMedia(
            f"content-encoding={encoding[:80]!r} is not supported; allowed: {', '.join(WINDOWS)}, or none",
            headers={"accept-encoding": ", ".join(WINDOWS)},
        )
    stream = zlib.decompressobj(WINDOWS[encoding])
    try:
        data = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise MalformedBody(f"the body is not {encoding}, as content-encoding says ({error})") from error
    if len(data) > limit:
        raise BodyTooLarge(
            f"a body of more than {limit} bytes once decompressed exceeds --max-body-bytes={limit}; send less, or "
            "restart with a higher limit"
        )
    if not stream.eof:
        raise MalformedBody(f"the body's {encoding} stream ends early; send all of it")
    if stream.unused_data:
        raise MalformedBody(
            f"{len(stream.unused_data)} bytes follow the body's {encoding} stream; send one stream"
        )
    return data
