"""The official text of a BabyLM year, fetched and unpacked for prepare.py."""
import errno
import http.client
import os
import shutil
import sys
import urllib.error
import urllib.request
import zipfile

from tqdm import tqdm

from lib.files import lock, parse_json, read_json, regular, sha256, write_json

OFFICIAL = {  # year -> {archive: address}; 2024's addresses are asked of the archive's listing
    "2023": {"babylm_data.zip": "https://github.com/babylm/babylm.github.io/raw/main/babylm_data.zip"},
    "2024": "https://api.osf.io/v2/nodes/ad7qg/files/osfstorage/",
    "2025": {"train_10M.zip": "https://osf.io/download/y7djq/",
             "train_100M.zip": "https://osf.io/download/ywea7/",
             "dev.zip": "https://osf.io/download/uyd7v/", "test.zip": "https://osf.io/download/ftwu3/"},
}

UNPACKING = ".unpacking"  # in the folder of text, as long as it is not whole
# errors that are not the archive's fault
THE_MACHINES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE)


def download(year, track, folder):
    """Fetch and unpack the official archives of `year` that `track` needs into `folder`."""
    os.makedirs(folder, exist_ok=True)
    lock(folder)
    of_year = os.path.join(folder, "download.json")  # the archives of two years have the same names
    if os.path.isfile(of_year) and read_json(of_year, ["year"])["year"] != year:
        sys.exit(f"error: {folder} has another year's download ({of_year}); name another --input_dir")
    write_json(of_year, dict(year=year))
    not_needed = "train_100M.zip" if track == "10M" else "train_10M.zip"
    archives, digests = OFFICIAL[year], {}
    try:
        if isinstance(archives, str):
            archives, digests = list_osf(archives, "text_data")
        for name, address in archives.items():
            if name != not_needed:
                path = os.path.join(folder, name)
                fetch(address, path, digests.get(name))
                unpack(path, folder, address)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, http.client.HTTPException) as e:
        sys.exit(f"error: download of {year} failed ({e}); the archives can also be fetched by hand "
                 f"and unpacked into {folder}")


def unpack(path, folder, address):
    """Put the archive's files into `folder`, each whole or not at all."""
    tmp = os.path.join(folder, UNPACKING)
    shutil.rmtree(tmp, ignore_errors=True)
    os.mkdir(tmp)
    try:
        with zipfile.ZipFile(path) as z:
            z.extractall(tmp)
    except Exception as e:  # damaged, encrypted or oddly compressed: zipfile has a dozen errors for it
        shutil.rmtree(tmp, ignore_errors=True)
        if isinstance(e, MemoryError) or getattr(e, "errno", None) in THE_MACHINES:
            raise
        os.replace(path, path + ".bad")  # so that the next try fetches it again
        raise ValueError(f"{address} cannot be unpacked: {type(e).__name__}: {e}; see {path}.bad")
    for parent, _, names in os.walk(tmp):
        target = os.path.normpath(os.path.join(folder, os.path.relpath(parent, tmp)))
        os.makedirs(target, exist_ok=True)
        for name in names:
            os.replace(os.path.join(parent, name), os.path.join(target, name))
    shutil.rmtree(tmp)


def list_osf(address, folder):
    """{archive: address} and {archive: SHA-256} of a folder of an OSF project, by its public listing."""
    def entries(url):
        while url:
            with urllib.request.urlopen(url, timeout=60) as r:
                page = parse_json(r.read())
            yield from page["data"]
            url = page["links"].get("next")
    for entry in entries(address):
        if entry["attributes"]["name"] == folder:
            files = list(entries(entry["relationships"]["files"]["links"]["related"]["href"]))
            archives = {f["attributes"]["name"]: f for f in files if f["attributes"]["name"].endswith(".zip")}
            return ({name: f["links"]["download"] for name, f in archives.items()},
                    {name: f["attributes"]["extra"]["hashes"]["sha256"] for name, f in archives.items()})
    raise ValueError(f"no {folder} at {address}")


def fetch(address, path, digest=None):
    """Download to `path`, going on where an earlier try stopped (`path`.part); checks SHA-256 if known."""
    if os.path.exists(regular(path)):
        return
    part = regular(path + ".part")
    have = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as r:
            have = have if r.status == 206 else 0  # a server that ignores Range sends all of it again
            total = have + int(r.headers.get("Content-Length") or 0)
            bar = tqdm(total=total, initial=have, desc=os.path.basename(path), unit="B", unit_scale=True)
            with bar, open(part, "ab" if have else "wb") as f:
                while data := r.read(1 << 20):
                    f.write(data)
                    bar.update(len(data))
    except urllib.error.HTTPError as e:
        if e.code != 416:  # 416: nothing is left to fetch
            raise
        total = have
    if os.path.getsize(part) < total:
        raise OSError(f"{address} broke off at {os.path.getsize(part)} of {total} bytes; run again to go on")
    got = sha256(part)
    if digest and got != digest:
        os.remove(part)
        raise OSError(f"{address} has SHA-256 {got}, expected {digest}")
    print(f"{path}: SHA-256 {got}" + (" as expected" if digest else " (none published to compare with)"))
    os.rename(part, path)
