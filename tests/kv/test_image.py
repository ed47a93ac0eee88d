"""The session image: what goes in comes out, and what was touched on the way is refused."""

import json
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kv_images import BLOCK, FORMAT, bits, conversation, images, pools, same
from safetensors.torch import load

from loopserve.kv.image import (
    BlockNamer,
    BranchImage,
    ImageRefused,
    KVFormat,
    Refusal,
    SessionImage,
    decode,
    encode,
    format_digest,
)
from loopserve.kv.sealed import make_head, make_seal, read_head

SMALL = KVFormat(fingerprint="tiny", num_layers=1, num_kv_heads=1, head_dim=1, dtype=torch.float16)
SHARED = BranchImage(tuple(range(40)), 35, 20, 3, (0, 1, 2))
IMAGE = SessionImage("s", "t", 3, (SHARED, replace(SHARED, num_tokens=32, blocks=(0, 1))), *pools(SMALL, 3, 1))
ENCODED = encode(IMAGE, SMALL)


def refusal_of(data: bytes, fmt: KVFormat = SMALL) -> Refusal:
    with pytest.raises(ImageRefused) as refused:
        decode(data, fmt)
    return refused.value.reason


def parts_of(data: bytes) -> tuple[dict, bytes]:
    """The header as it is read, and the bytes behind it but for the seal."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length : -16]


def sealed(header: dict, body: bytes) -> bytes:
    """A file whose seal is right, whatever it says."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head + body + make_seal(head)


@given(images())
def test_what_is_encoded_is_decoded(image):
    assert same(image, decode(encode(image, FORMAT), FORMAT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_of_every_dtype_comes_back(dtype):
    fmt = replace(FORMAT, dtype=dtype)
    image = conversation("s", 4 * BLOCK, fmt=fmt)
    decoded = decode(encode(image, fmt), fmt)
    assert torch.equal(bits(decoded.keys), bits(image.keys)) and torch.equal(bits(decoded.values), bits(image.values))
    assert torch.isnan(image.keys).any(), "NaNs are part of the test"


def test_image_is_a_safetensors_file():
    tensors = load(ENCODED)
    assert tensors.keys() == {"keys", "values", "token_ids", "seal"}
    assert torch.equal(bits(tensors["keys"][:, :2]), bits(IMAGE.keys[:, :2]))
    assert tensors["token_ids"].tolist() == [*range(40), *range(40)] and tensors["token_ids"].dtype == torch.int32


def test_what_lay_behind_the_last_computed_token_is_not_told():
    tensors = load(ENCODED)
    for name, pool in (("keys", IMAGE.keys), ("values", IMAGE.values)):
        assert torch.equal(bits(tensors[name][:, 2, :3]), bits(pool[:, 2, :3]))
        assert bits(pool[:, 2, 3:]).any() and not bits(tensors[name][:, 2, 3:]).any()


def test_image_is_not_changed_by_encoding():
    keys = IMAGE.keys.clone()
    encode(IMAGE, SMALL)
    assert torch.equal(bits(keys), bits(IMAGE.keys))


def test_pools_need_not_be_contiguous():
    keys, values = (pool.transpose(1, 2).contiguous().transpose(1, 2) for pool in (IMAGE.keys, IMAGE.values))
    assert not keys.is_contiguous()
    assert encode(replace(IMAGE, keys=keys, values=values), SMALL) == ENCODED


def test_decoded_tensors_lie_in_a_buffer_that_can_be_written_and_beside_one_that_cannot():
    data = bytearray(ENCODED)
    aliased, copied = decode(data, SMALL), decode(ENCODED, SMALL)
    aliased.keys.zero_()
    copied.keys.zero_()
    assert refusal_of(bytes(data)) is Refusal.CORRUPT
    assert same(decode(ENCODED, SMALL), IMAGE)


@pytest.mark.parametrize(
    "spoiled",
    [
        {"num_turns": -1},
        {"branches": (replace(SHARED, exact_tokens=36),)},
        {"branches": (replace(SHARED, num_tokens=41),)},
        {"branches": (replace(SHARED, sparse_from=41),)},
        {"branches": (replace(SHARED, blocks=(0, 1)),)},
        {"branches": (replace(SHARED, blocks=(0, 1, 3)),)},
        {"branches": (replace(SHARED, blocks=(0, 1, 1)),)},
        {"branches": (replace(SHARED, blocks=(0, 1, -1)),)},
        {"branches": (replace(SHARED, token_ids=(-1, *range(39))),)},
        {"branches": (replace(SHARED, token_ids=(2**31, *range(39))),)},
        {"keys": IMAGE.keys.float()},
        {"values": IMAGE.values[:, :2]},
    ],
)
def test_bad_image_is_not_encoded(spoiled):
    with pytest.raises(AssertionError):
        encode(replace(IMAGE, **spoiled), SMALL)


def test_no_bit_can_be_flipped():
    for place in range(len(ENCODED)):
        for bit in range(8) if place < 1200 else (place % 8,):
            data = bytearray(ENCODED)
            data[place] ^= 1 << bit
            with pytest.raises(ImageRefused):
                decode(bytes(data), SMALL)


def test_every_shorter_image_is_truncated():
    header_end = 8 + int.from_bytes(ENCODED[:8], "little")
    for length in range(len(ENCODED)):
        assert refusal_of(ENCODED[:length]) is Refusal.TRUNCATED, length
    assert 8 < header_end < len(ENCODED)


@given(st.binary(min_size=1, max_size=50))
def test_longer_image_is_refused(more):
    assert refusal_of(ENCODED + more) is Refusal.CORRUPT
    with pytest.raises(ImageRefused):
        decode(more + ENCODED, SMALL)


@given(st.data())
def test_swapped_parts_are_refused(data):
    length = data.draw(st.integers(1, 200))
    starts = st.integers(0, len(ENCODED) - length)
    first, second = sorted((data.draw(starts), data.draw(starts)))
    if second < first + length:
        return
    swapped = bytearray(ENCODED)
    swapped[first : first + length], swapped[second : second + length] = (
        ENCODED[second : second + length],
        ENCODED[first : first + length],
    )
    if swapped != ENCODED:
        with pytest.raises(ImageRefused):
            decode(bytes(swapped), SMALL)


def test_parts_of_two_images_make_none():
    other = encode(replace(IMAGE, session_id="u"), SMALL)
    assert len(other) == len(ENCODED)
    for cut in range(1, len(ENCODED)):
        spliced = ENCODED[:cut] + other[cut:]
        if spliced not in (ENCODED, other):
            with pytest.raises(ImageRefused):
                decode(spliced, SMALL)


def test_blocks_that_change_places_are_refused():
    header, body = parts_of(ENCODED)
    size = BLOCK * SMALL.dtype.itemsize
    assert refusal_of(sealed(header, body[size : 2 * size] + body[:size] + body[2 * size :])) is Refusal.CORRUPT
    half = 3 * size  # keys and values
    assert refusal_of(sealed(header, body[half : 2 * half] + body[:half] + body[2 * half :])) is Refusal.CORRUPT


@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_are_refused(noise, has_length):
    with pytest.raises(ImageRefused):
        decode(len(noise).to_bytes(8, "little") + noise + bytes(16) if has_length else noise, SMALL)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"{}", b'{"__metadata__": 5}', b"\xff" * 8, b'{"a": ' + b"9" * 5000 + b"}", b"null"]
)
def test_header_that_is_none_is_refused(text):
    assert refusal_of(len(text).to_bytes(8, "little") + text + bytes(100)) is Refusal.FOREIGN


def test_safetensors_file_of_somebody_else_is_foreign():
    header = b'{"weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}     '
    assert refusal_of(len(header).to_bytes(8, "little") + header + bytes(8)) is Refusal.FOREIGN
    head = make_head("somebody.else", 1, "{}", ())
    assert refusal_of(head + make_seal(head)) is Refusal.FOREIGN


@pytest.mark.parametrize(
    "fmt",
    [
        replace(SMALL, fingerprint="tinier"),
        replace(SMALL, num_layers=2),
        replace(SMALL, num_kv_heads=2),
        replace(SMALL, head_dim=2),
        replace(SMALL, dtype=torch.bfloat16),
        replace(SMALL, block_tokens=32),
    ],
)
def test_image_of_another_format_is_foreign(fmt):
    assert refusal_of(ENCODED, fmt) is Refusal.FOREIGN
    assert format_digest(fmt) != format_digest(SMALL)


def test_image_of_another_version_is_told_apart():
    header, body = parts_of(ENCODED)
    header["__metadata__"]["version"] = "2"
    assert refusal_of(sealed(header, body)) is Refusal.VERSION


ABOUTS = [
    lambda about: about.pop("salt"),
    lambda about: about.update(num_turns="3"),
    lambda about: about.update(num_turns=-3),
    lambda about: about.update(session_id='"'),
    lambda about: about.update(block_checksums=[]),
    lambda about: about["block_checksums"].append("00" * 16),
    lambda about: about["block_checksums"].reverse(),
    lambda about: about.update(token_ids_checksum=""),
    lambda about: about.update(branches=[]),
    lambda about: about["branches"][0].update(history_len=39),
    lambda about: about["branches"][0].update(history_len=-1),
    lambda about: about["branches"][0].update(num_tokens=10**30),
    lambda about: about["branches"][0].update(blocks=[0, 1, 99]),
    lambda about: about["branches"][0].update(blocks=[0, 1, -1]),
    lambda about: about["branches"][0].update(sparse_from=1.5),
    lambda about: about.update(salt="another"),  # block checksums are the tenant's
]


@pytest.mark.parametrize("spoil", ABOUTS)
def test_well_sealed_nonsense_is_refused(spoil):
    header, body = parts_of(ENCODED)
    about = json.loads(header["__metadata__"]["about"])
    spoil(about)
    header["__metadata__"]["about"] = json.dumps(about)
    assert refusal_of(sealed(header, body)) is Refusal.CORRUPT


TENSORS = [
    lambda header: header.pop("values"),
    lambda header: header["keys"].update(dtype="F64"),
    lambda header: header["keys"].update(shape=[1, 3, 16, 1, -1]),
    lambda header: header["keys"].update(shape=[1, 3, 16, 1, 10**25]),
    lambda header: header["keys"].update(shape=[3, 1, 16, 1, 1]),
    lambda header: header["keys"].update(data_offsets=[0, 2]),
    lambda header: header["values"].update(data_offsets=header["keys"]["data_offsets"]),
    lambda header: header["seal"].update(dtype="I32", shape=[4]),
    lambda header: header.update(seal=header.pop("seal") | {"shape": [2, 8]}),
]


@pytest.mark.parametrize("spoil", TENSORS)
def test_tensors_that_are_not_an_images_are_refused(spoil):
    header, body = parts_of(ENCODED)
    spoil(header)
    with pytest.raises(ImageRefused):
        decode(sealed(header, body), SMALL)


@given(st.randoms(use_true_random=False))
def test_well_sealed_headers_with_any_change_never_raise_anything_else(chance: random.Random):
    header, body = parts_of(ENCODED)
    text = bytearray(json.dumps(header, separators=(",", ":")).encode())
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(text))
        text[place : place + chance.randint(0, 3)] = bytes(
            chance.choices(b'0123456789-.e"[]{},:\\ntkeysF', k=chance.randint(0, 3))
        )
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + bytes(text)
    try:
        decoded = decode(head + body + make_seal(head), SMALL)
    except ImageRefused:
        return
    assert torch.equal(bits(decoded.keys[:, :2]), bits(IMAGE.keys[:, :2])), "what is taken has passed its checksums"


def test_reading_a_head_brings_no_tensor():
    asked: list[tuple[int, int]] = []

    def read(offset: int, length: int) -> bytes:
        asked.append((offset, length))
        return ENCODED[offset : offset + length]

    head = read_head("loopserve.session_image", 1, len(ENCODED), read)
    first, last = head.starts[0], len(ENCODED) - 16
    assert all(offset + length <= first or offset >= last for offset, length in asked)


def test_blocks_are_named_alike_within_a_tenant_only():
    block = torch.zeros(SMALL.block_shape, dtype=SMALL.dtype)
    names = {
        BlockNamer(fmt, salt).name(block)
        for fmt in (SMALL, replace(SMALL, fingerprint="x"))
        for salt in ("", "a", "\ud800")
    }
    assert len(names) == 6
    assert BlockNamer(SMALL, "a").name(block) == BlockNamer(SMALL, "a").name(block.clone())
