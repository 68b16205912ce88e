"""Download one official archive over a slow line: resume, retry, verify.

The file grows as `<name>.part`; it gets its name only when its md5 is right, so that a name without
`.part` is a whole archive.
"""

import errno
import http.client
import os
import pathlib
import re
import time
import urllib.error
import urllib.request

from tqdm import tqdm

from jaxcifar.data.folders import os_error
from jaxcifar.data.official import check_md5
from jaxcifar.data.specs import Archive, DataError

MAX_FAILURES = 6  # in a row, without one new byte
BACKOFF_S = 2.0  # doubled after every such failure: 2, 4, ... 64 s
TIMEOUT_S = 60.0
_BLOCK = 1 << 16


class _Refused(Exception):
    """The server's answer makes another try pointless."""


def fetch(url: str, archive: Archive, path: pathlib.Path, say=print) -> pathlib.Path:
    """Download `url` to `path`, continuing an earlier `path.part`; return `path`, verified by md5.

    `say` takes one line of text. Raises DataError when the server refuses, when MAX_FAILURES tries
    in a row bring nothing new, or when the whole file twice has a wrong md5.
    """
    if path.exists():
        check_md5(path, archive)
        return path
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    say(
        f"downloading {url} ({archive.num_bytes / 1e6:,.0f} MB) to {path}. That server is slow, "
        "often 50-85 kB/s, which takes about an hour; an interrupted download continues when "
        "started again. Faster, if there is a copy from torchvision, Keras or a colleague: "
        "--source PATH (the archive or the extracted folder)"
    )
    for last in (False, True):
        _fetch_all(url, archive, part, say)
        try:
            check_md5(part, archive)
        except DataError as error:
            part.unlink()
            if last:
                raise DataError(f"{url}: the download was complete twice, but damaged ({error}); "
                                "take the archive from elsewhere: --source PATH") from error
            say(f"{url}: the download is damaged (wrong md5); starting again from the beginning")
        else:
            os.replace(part, path)
            return path
    raise AssertionError("unreachable")


def _fetch_all(url, archive, part, say):
    """Append to `part` until it has the archive's size."""
    failures, best = 0, _size(part)
    with tqdm(desc=archive.file_name, total=archive.num_bytes, initial=best, unit="B",
              unit_scale=True, disable=None) as bar:
        while _size(part) != archive.num_bytes:
            try:
                _transfer(url, archive, part, bar)
                reason = f"the connection ended at {_size(part):,} of {archive.num_bytes:,} bytes"
            except _Refused as error:
                raise DataError(f"{url}: {error}; {_other_ways(part)}") from error
            except urllib.error.HTTPError as error:
                reason = f"the server answers {error.code} {error.reason}"
            except (OSError, http.client.HTTPException) as error:  # URLError and timeouts too
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
                    raise os_error(error, part, "downloading") from error
                reason = getattr(error, "reason", None) or error
            if _size(part) == archive.num_bytes:
                return
            # a server that cannot continue starts over: only bytes never reached before count
            failures = 0 if _size(part) > best else failures + 1
            best = max(best, _size(part))
            if failures >= MAX_FAILURES:
                raise DataError(f"{url}: {failures} tries in a row brought nothing new ({reason}); "
                                f"{_other_ways(part)}")
            wait = BACKOFF_S * 2**failures
            say(f"{url}: {reason}; trying again in {wait:.0f} s")
            time.sleep(wait)


def _transfer(url, archive, part, bar):
    """Make one request for what `part` lacks, and append what comes."""
    if _size(part) > archive.num_bytes:
        part.unlink()
    start = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing there at this offset: what we hold is something else
            part.unlink()
        elif error.code < 500 and error.code not in (408, 429):
            raise _Refused(f"the server answers {error.code} {error.reason}") from error
        raise
    with response:
        continues = response.status == 206 and _range_start(response) == start
        start = start if continues else 0
        length = response.headers.get("Content-Length")
        if length is not None and start + int(length) != archive.num_bytes:
            if not continues:
                raise _Refused(f"the server offers {int(length):,} bytes, expected "
                               f"{archive.num_bytes:,}: not the official {archive.file_name}")
        bar.n = start
        with open(part, "ab" if continues else "wb") as file:
            while block := response.read(_BLOCK):
                file.write(block)
                bar.update(len(block))


def _range_start(response):
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _other_ways(part):
    kept = f"{_size(part):,} bytes are kept in {part}; " if _size(part) else ""
    return (f"{kept}run again to continue, or give a copy from elsewhere: --source PATH (the "
            "official archive or the extracted folder), or try without data: configs/quickstart.py")
