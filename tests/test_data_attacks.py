"""More than 2,000 damaged inputs: each must end as a reject with a reason or as a correct sample,
and the sums must agree.

It is no cell because of its number. Every mutation is a function of a seed, so that a failure
names what to repeat."""

import copy, gzip, io, json, math, os, random, struct, time, zlib

import numpy as np
import pytest

from data_formats import DOCUMENTS, media_root
from fgclip_nb.data.filters import check_media, filter_regions, write_rejects
from fgclip_nb.data.samples import Sample
from fgclip_nb.data.load import load_samples

DONE = {"inputs": 0}
SLOW = 5.0  # processor seconds one input may take: more is a hang


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return media_root(tmp_path_factory.mktemp("media"))


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level("CRITICAL", logger="fgclip_nb")


def judge(path, root, told):
    "Load and filter one file; every promise is checked."
    begun = time.process_time()
    samples, rejects = load_samples(path, root, missing="reject")
    kept, dropped = filter_regions(samples)
    assert time.process_time() - begun < SLOW, f"slow: {told}"
    c = samples.counts
    assert c["entries"] == c["entries_kept"] + c["entries_rejected"], told
    counted = sum(len(s.regions) for s in samples) + sum(r.regions for r in rejects)
    assert c["regions"] == c["regions_kept"] + c["regions_rejected"] == counted, told
    assert c["entries_kept"] == sum(s.entries for s in samples), told
    assert sum(len(s.regions) for s in samples) == sum(len(s.regions) for s in kept) + len(
        dropped
    ), told
    assert len(samples) + len(rejects) > 0 or c["entries"] == 0, f"vanished: {told}"
    for r in rejects + dropped:
        assert r.reason and r.rule and r.file and len(r.value) <= 130, (told, r)
    for s in kept:
        correct(s, str(root), told)
    DONE["inputs"] += 1
    return samples, rejects


def correct(s, root, told):
    "What a sample that passed may be."
    assert (
        s.media.startswith(root + os.sep)
        and os.path.isfile(s.media)
        and s.kind in ("image", "video")
    ), (told, s.media)
    for text in (
        s.id,
        s.caption,
        s.short_caption,
        *s.captions,
        *(t for r in s.regions for t in (r.phrase, r.long_phrase, *r.negatives)),
    ):
        text.encode()
    assert s.span is None or all(map(math.isfinite, s.span)) and s.span[0] <= s.span[1], told
    for r in s.regions:
        assert r.phrase.strip(), told
        for b in ([r.box] if r.box else []) + [k.bbox for k in r.keyframes if k.enabled]:
            assert all(-1e-6 <= v <= 1 + 1e-6 for v in b) and b[0] < b[2] and b[1] < b[3], (told, b)


# ---- values put in the place of others

STRANGE = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**400,
    -0.0,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    "",
    " ",
    "0.5",
    "nan",
    "\ud800",
    "\0",
    "a" * 200_000,
    "红色的杯子",
    "../../../etc/passwd",
    "/etc/passwd",
    "http://example.org/a.jpg",
    [],
    [[]],
    [None],
    {},
    {"a": {}},
    [0.1, 0.2],
    [0.9, 0.9, 0.1, 0.1],
    [0.5, 0.5, 0.5, 0.5],
    [0, 0, 1e-9, 1e-9],
    [-5, -5, 9, 9],
    [10, 20, 300, 400],
    [math.nan] * 4,
    [0, 0, math.inf, 1],
    ["0", "0", "1", "1"],
    [True, True, True, True],
    [[0, 0], [1, 1]],
    list(range(3000)),
    [{"frame": -1, "bbox": [0, 0, 1, 1]}],
    [{"frame": 5.5, "bbox": [0, 0, 1, 1]}],
    [{"frame": "5", "bbox": [0, 0, 1, 1]}],
    [{}] * 50,
]


def leaves(value, path=()):
    "Every place of a JSON value, containers included."
    yield path
    below = ()
    if isinstance(value, dict):
        below = value.items()
    elif isinstance(value, list):
        below = enumerate(value)
    for k, v in below:
        yield from leaves(v, path + (k,))


def put(document, path, value):
    "The document with one place replaced."
    if not path:
        return value
    document = copy.deepcopy(document)
    at = document
    for k in path[:-1]:
        at = at[k]
    at[path[-1]] = value
    return document


def drop(document, path):
    document = copy.deepcopy(document)
    at = document
    for k in path[:-1]:
        at = at[k]
    del at[path[-1]]
    return document


def dumps(document):
    return json.dumps(document, ensure_ascii=True)


SEEDS = [
    0,
    pytest.param(1, marks=pytest.mark.long),
    pytest.param(2, marks=pytest.mark.long),
    pytest.param(3, marks=pytest.mark.long),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_strange_values(name, seed, root, tmp_path):
    rng = random.Random(f"{name} {seed}")
    places = [p for p in leaves(DOCUMENTS[name])]
    for i in range(130 + 2000 * (seed > 0)):
        place, value = rng.choice(places), rng.choice(STRANGE)
        (tmp_path / "d.json").write_text(dumps(put(DOCUMENTS[name], place, value)))
        judge(tmp_path / "d.json", root, (name, seed, i, place, repr(value)[:50]))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_lost_and_doubled_fields(name, root, tmp_path):
    places = [p for p in leaves(DOCUMENTS[name]) if p]
    rng = random.Random(name)
    for i, place in enumerate(rng.sample(places, min(40, len(places)))):
        (tmp_path / "d.json").write_text(dumps(drop(DOCUMENTS[name], place)))
        judge(tmp_path / "d.json", root, (name, "lost", place))
    keys = sorted({p[-1] for p in places if isinstance(p[-1], str)})
    for key in keys:  # the same key twice in one object
        text, mark = dumps(DOCUMENTS[name]), f'"{key}": '
        (tmp_path / "d.json").write_text(text.replace(mark, f'"{key}": 3, {mark}', 1))
        judge(tmp_path / "d.json", root, (name, "doubled", key))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_truncated_and_garbled_bytes(name, seed, root, tmp_path):
    rng = random.Random(f"{name} {seed}")
    lines = isinstance(DOCUMENTS[name], list)
    whole = (
        "\n".join(map(dumps, DOCUMENTS[name]))
        if lines and rng.random() < 0.5
        else dumps(DOCUMENTS[name])
    ).encode()
    for i in range(30):
        cut = whole[: rng.randrange(len(whole))]
        (tmp_path / "d.json").write_bytes(
            cut if i % 3 else gzip.compress(whole)[: rng.randrange(2, 200)]
        )
        judge(tmp_path / "d.json", root, (name, seed, "cut", i))
    for i in range(30 + 500 * (seed > 0)):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 3, 20))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "d.json").write_bytes(data)
        judge(tmp_path / "d.json", root, (name, seed, "garbled", i))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_encodings(name, root, tmp_path):
    text = (
        json.dumps(DOCUMENTS[name], ensure_ascii=False)
        .replace("mug", "кружка café")
        .replace("man", "男人")
    )
    for encoding in (
        "utf-8",
        "utf-8-sig",
        "utf-16",
        "utf-16-le",
        "utf-16-be",
        "utf-32",
        "latin-1",
        "gbk",
        "cp1251",
        "shift_jis",
    ):
        (tmp_path / "d.json").write_bytes(text.encode(encoding, "replace"))
        samples, rejects = judge(tmp_path / "d.json", root, (name, encoding))
        if encoding.startswith("utf"):
            assert samples, (name, encoding, rejects[:1])


STRUCTURES = {
    "deep list": "[" * 200_000,
    "deep object": '{"a":' * 100_000,
    "deep and closed": "[" * 5000 + "]" * 5000,
    "deep in a row": '[{"f_path": "a.jpg", "caption": ' + "[" * 50_000 + "]" * 50_000 + "}]",
    "nothing": "",
    "white": " \n\n ",
    "null": "null",
    "number": "42",
    "text": '"hello"',
    "empty list": "[]",
    "empty object": "{}",
    "empty lines": "{}\n{}\n",
    "two values": "[] []",
    "html": "<html><body>404</body></html>",
    "csv": "a,b\n1,2\n",
    "commas": "[,,,]",
    "only a bracket": "[",
    "only a brace": "{",
    "bom": "\ufeff[]",
    "comment": "// x\n[]",
    "long number": "[" + "9" * 100_000 + "]",
    "many commas": "[" + "0," * 20_000 + "0]",
    "one long line": '{"f_path": "' + "a" * 3_000_000 + '"}',
    "nul": "\0" * 1000,
    "python": "[{'f_path': 'a.jpg'}]",
    "nan rows": "[NaN, Infinity, -Infinity]",
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name, root, tmp_path):
    (tmp_path / "d.json").write_text(STRUCTURES[name])
    samples, rejects = judge(tmp_path / "d.json", root, name)
    assert not samples and (rejects or name in ("empty list", "bom"))


def test_huge_lists(root, tmp_path):
    boxes = [
        {"bbox": [0.1, 0.1, 0.9, 0.9], "short_expr": "a mug", "flag_short_neg": 0}
    ] * 20_000 + ["x"] * 1000
    (tmp_path / "d.json").write_text(dumps([{"f_path": "a.jpg", "bbox_info": boxes}]))
    samples, rejects = judge(tmp_path / "d.json", root, "huge")
    assert len(samples[0].regions) == 20_000 and len(rejects) == 1000


def test_a_gzip_bomb_is_no_entry(root, tmp_path):
    packer = zlib.compressobj(9, wbits=31)
    bomb = (
        b"".join(packer.compress(b" " * 10_000_000) for _ in range(10))
        + packer.compress(b"[]")
        + packer.flush()
    )  # 100 MB in 100 kB
    (tmp_path / "d.json.gz").write_bytes(bomb)
    judge(tmp_path / "d.json.gz", root, "bomb")


def test_files_that_are_no_files(root, tmp_path):
    (
        (tmp_path / "dir.json").mkdir(),
        os.mkfifo(tmp_path / "pipe.json"),
        (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json"),
    )
    (tmp_path / "d.json").write_text(dumps(DOCUMENTS["finehard"]))
    assert len(load_samples(tmp_path, root)[0]) == 3
    (tmp_path / "list.txt").write_text(
        "d.json\npipe.json\nloop.json\ndir.json\n" + "x" * 5000 + "\n\0\n/dev/zero\n"
    )
    samples, rejects = load_samples(tmp_path / "list.txt", root)
    assert len(samples) == 3 and len(rejects) == 6


def test_rejects_are_written_whole(root, tmp_path):
    (tmp_path / "d.json").write_text(dumps(put(DOCUMENTS["finehard"], (0, "caption"), "\ud800")))
    _, rejects = load_samples(tmp_path / "d.json", root)
    write_rejects(rejects, tmp_path / "rejects.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert rows == [r.as_dict() for r in rejects] and set(rows[0]) >= {
        "file",
        "entry",
        "field",
        "value",
        "reason",
        "rule",
    }


# ---- photos


def picture(mode="RGB", size=(60, 40), format="PNG", **kw):
    from PIL import Image

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65535, (size[1], size[0]), dtype=np.uint16))
    elif mode == "P-alpha":
        image, kw = image.convert("P"), {"transparency": 0, **kw}
    elif mode != "RGB":
        image = image.convert(mode)
    out = io.BytesIO()
    image.save(out, format, **kw)
    return out.getvalue()


def bomb(width, height):
    "A PNG whose header promises far more pixels than it holds."

    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def exif(orientation):
    from PIL import Image

    e = Image.Exif()
    e[274] = orientation
    return e


GOOD = {
    "rgb": picture(),
    "jpeg": picture(format="JPEG"),
    "cmyk": picture("CMYK", format="JPEG"),
    "16 bit": picture("I;16"),
    "palette": picture("P"),
    "palette with transparency": picture("P-alpha"),
    "alpha": picture("RGBA"),
    "grey": picture("L"),
    "grey alpha": picture("LA"),
    "one bit": picture("1"),
    "gif": picture("P", format="GIF"),
    "webp": picture(format="WEBP"),
    "bmp": picture(format="BMP"),
    "tiff": picture(format="TIFF"),
    "one pixel": picture(size=(1, 1)),
    **{f"exif {o}": picture(format="JPEG", exif=exif(o)) for o in range(1, 9)},
}
BAD = {
    "empty": b"",
    "text": b"not a photo",
    "html": b"<html></html>",
    "bomb": bomb(200_000, 200_000),
    "promise": bomb(5000, 5000),
    "json": b"[]",
    "nul": b"\0" * 5000,
}


def judge_media(data, folder, name, told):
    path = folder / name
    path.write_bytes(data)
    begun = time.process_time()
    kept, rejects = check_media([Sample("s", str(path), regions=[])])
    assert time.process_time() - begun < SLOW, told
    assert len(kept) + len(rejects) == 1 and all(
        r.reason and r.rule == "unreadable_media" for r in rejects
    ), told
    DONE["inputs"] += 1
    path.unlink()
    return bool(kept)


def test_pictures_of_every_kind(tmp_path):
    from fgclip_nb.data.photos import read_image

    for kind, data in GOOD.items():
        for name in ("a.png", "a.jpg", "a.txt", "a"):  # the extension says nothing
            assert judge_media(data, tmp_path, name, kind), (kind, name)
    (tmp_path / "x.jpg").write_bytes(GOOD["exif 6"])
    assert read_image(tmp_path / "x.jpg").shape == (60, 40, 3)  # turned upright
    for kind, data in BAD.items():
        assert not judge_media(data, tmp_path, "a.jpg", kind), kind


def test_damaged_pictures(tmp_path):
    rng = random.Random(0)
    cut = 0
    for i in range(200):
        kind, data = rng.choice(sorted(GOOD.items()))
        if i % 2:
            cut += not judge_media(
                data[: rng.randrange(len(data))], tmp_path, "a.jpg", (kind, "cut", i)
            )
        else:
            garbled = bytearray(data)
            for _ in range(rng.choice((1, 10, 100))):
                garbled[rng.randrange(len(garbled))] = rng.randrange(256)
            judge_media(bytes(garbled), tmp_path, "a.jpg", (kind, "garbled", i))
    assert cut > 80  # nearly every cut picture is noticed; some formats end before their last bytes


def test_there_were_enough():
    "Runs last: the number of damaged inputs that were judged."
    assert DONE["inputs"] >= 2000, DONE


# ---- little files that unpack to much, and lists without an end


def packed(*chunks):
    "A gzip file of chunks (bytes, how many times)."
    packer = zlib.compressobj(9, wbits=31)
    return b"".join(packer.compress(c) for c, n in chunks for _ in range(n)) + packer.flush()


MUCH = 10_000_000
BOMBS = {
    "newlines": packed((b'{"image": "a.jpg"}\n', 1), (b"\n" * MUCH, 100), (b"{}\n", 1)),
    "newlines alone": packed((b"\n" * MUCH, 100)),
    "spaces": packed((b" " * MUCH, 100), (b"[]", 1)),
    "spaces in a list": packed((b"[", 1), (b" " * MUCH, 100), (b"]", 1)),
    "spaces in an object": packed((b'{"a" ', 1), (b" " * MUCH, 100), (b": 1}", 1)),
    "spaces in lines": packed((b'{"image": "a.jpg"}\n', 1), (b" " * MUCH, 100), (b"\n{}\n", 1)),
    "empty objects": packed((b"{}\n" * (MUCH // 3), 30)),
    "zeros": packed((b"[", 1), (b"0," * (MUCH // 2), 30), (b"0]", 1)),
    "one text": packed((b'["', 1), (b"a" * MUCH, 100), (b'"]', 1)),
    "brackets": packed((b"[" * MUCH, 100)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_little_file_takes_no_long_time(name, root, tmp_path, monkeypatch):
    from fgclip_nb.data import source

    monkeypatch.setattr(source, "MOST_LOST", 5000)
    (tmp_path / "d.jsonl.gz").write_bytes(BOMBS[name])
    begun = time.process_time()
    samples, rejects = load_samples(tmp_path / "d.jsonl.gz", root)
    assert time.process_time() - begun < 20
    assert not samples and 1 <= len(rejects) < 5100


def test_an_object_of_many_keys_with_one_twice(root, tmp_path):
    keys = ", ".join(f'"k{i}": {i}' for i in range(60_000))
    for text in ('[{"f_path": "a.jpg", %s, "k7": 1}]', '{"f_path": "a.jpg", %s, "k7": 1}'):
        (tmp_path / "d.json").write_text(text % keys)
        judge(tmp_path / "d.json", root, "many keys")


@pytest.mark.long
def test_large_pictures_take_little_memory(tmp_path):
    "81 megapixels in a file of some kilobytes, read at 224 pixels by a process of its own."
    import subprocess, sys
    from PIL import Image

    file = tmp_path / "large.png"
    Image.new("RGBA", (9000, 9000), (10, 200, 30, 128)).save(file, compress_level=1)
    code = (
        "from fgclip_nb.data.photos import read_image\n"
        f"assert read_image({str(file)!r}, 224).shape == (224, 224, 3)\n"
        "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(done.stdout) < 500_000, f"{done.stdout} KiB {done.stderr}"


def test_how_many_pixels_a_photo_may_have_is_a_parameter(tmp_path):
    from PIL import Image
    from fgclip_nb.data.photos import limit_pixels

    usual = Image.MAX_IMAGE_PIXELS
    try:
        for limit in (0.0015, 0.001):  # under twice the limit Pillow only warns
            limit_pixels(limit)
            (tmp_path / "a.png").write_bytes(picture())
            reason = str(check_media([Sample("s", str(tmp_path / "a.png"))])[1][0])
            assert "max_megapixels" in reason, reason
        assert not judge_media(picture(), tmp_path, "a.png", "limited")
    finally:
        Image.MAX_IMAGE_PIXELS = usual
