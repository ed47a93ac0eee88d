"""Streams of text against the tokenizers' own whole decoding, and stop strings against a character-by-character search."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from loopserve.detokenizer import StopScanner, Vocabulary

CHARS = sorted({*"abehlortwxyz !?.,'\n\t", *"éß你好ก"})


def fast(backend: Tokenizer, **kwargs: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", **kwargs)


def byte_level() -> PreTrainedTokenizerFast:
    """All 256 bytes, a few merges, one special and two plain added tokens (one of them outside GPT-2's alphabet)."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("Ã", "©")]
    vocab = {piece: i for i, piece in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("<｜x y｜>", special=False)])
    return fast(backend)


def metaspace(prepend_scheme: str = "always") -> PreTrainedTokenizerFast:
    pieces = ["<unk>", "▁", "▁he", "llo", "▁w", *[c for c in CHARS if c != " "]]
    vocab = [(piece, -float(i + 1)) for i, piece in enumerate(pieces)]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    return fast(backend)


def byte_fallback(*, strips: bool = True) -> PreTrainedTokenizerFast:
    """Llama-like: prepended space, replaced spaces, bytes for what is not in the vocabulary."""
    pieces = ["<unk>", *[f"<0x{b:02X}>" for b in range(256)], "▁", *"abehlortwxyz!?.,'", "é", "he", "▁w"]
    backend = Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=[("h", "e"), ("▁", "w")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
    return fast(backend)


def word_piece() -> PreTrainedTokenizerFast:
    """A decoder that looks across pieces, so it is streamed by the library."""
    pieces = ["[UNK]", "hello", "world", "##s", "##er", "!", ","]
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return fast(backend)


TOKENIZERS = {
    "byte_level": byte_level(),
    "metaspace_always": metaspace(),
    "metaspace_never": metaspace("never"),
    "byte_fallback": byte_fallback(),
    "byte_fallback_unstripped": byte_fallback(strips=False),
    "word_piece": word_piece(),
}
VOCABULARIES = {name: Vocabulary(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def streamed(name: str, token_ids: list[int], *, is_continuation: bool = False) -> list[str]:
    stream = VOCABULARIES[name].stream(is_continuation=is_continuation)
    return [*map(stream.push, token_ids), stream.finish()]


def decoded(name: str, token_ids: list[int]) -> str:
    return TOKENIZERS[name].decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_known_decoders_are_spelt_byte_by_byte_and_others_by_the_library():
    assert {name: vocabulary.is_exact for name, vocabulary in VOCABULARIES.items()} == {
        name: name != "word_piece" for name in TOKENIZERS
    }


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(["byte_level", "metaspace_always", "metaspace_never"]), st.data())
def test_any_ids_stream_to_their_whole_decoding(name: str, data: st.DataObject):
    token_ids = data.draw(st.lists(st.integers(0, len(TOKENIZERS[name]) + 3), max_size=30))
    assert "".join(streamed(name, token_ids)) == decoded(name, token_ids)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(TOKENIZERS)), st.text(alphabet=[*CHARS, "🤖", "ﷺ", "�", "▁"], max_size=30))
def test_ids_of_any_text_stream_to_their_whole_decoding(name: str, text: str):
    token_ids = TOKENIZERS[name].encode(text, add_special_tokens=False)
    assert "".join(streamed(name, token_ids)) == decoded(name, token_ids)


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet=[*CHARS, "🤖", "€"], min_size=1, max_size=12))
def test_no_delta_ends_inside_a_character(text: str):
    for name in ("byte_level", "byte_fallback"):
        deltas = streamed(name, TOKENIZERS[name].encode(text, add_special_tokens=False))
        assert "�" not in "".join(deltas)


def test_a_character_comes_with_its_last_byte():
    token_ids = TOKENIZERS["byte_level"].encode("🤖", add_special_tokens=False)
    assert streamed("byte_level", token_ids) == ["", "", "", "🤖", ""]


def test_an_unfinished_character_is_shown_as_replacement_at_the_end():
    token_ids = TOKENIZERS["byte_level"].encode("a🤖", add_special_tokens=False)[:-1]
    assert streamed("byte_level", token_ids) == ["a", "", "", "", "�"]


def test_a_broken_byte_run_keeps_the_text_already_sent():
    token_ids = [1 + byte for byte in "你".encode()] + [1 + 0xFF]
    assert "".join(streamed("byte_fallback", token_ids)) == "你�"


def test_special_tokens_are_not_text_but_plain_added_tokens_are():
    tokenizer = TOKENIZERS["byte_level"]
    token_ids = tokenizer.encode("<think>he<eos><｜x y｜>", add_special_tokens=False)
    assert "".join(streamed("byte_level", token_ids)) == "<think>he<｜x y｜>"
    assert VOCABULARIES["byte_level"].is_special(tokenizer.eos_token_id)


@pytest.mark.parametrize("name", ["metaspace_always", "byte_fallback"])
def test_a_continuation_keeps_its_leading_space(name: str):
    token_ids = TOKENIZERS[name].encode("we", add_special_tokens=False)
    assert "".join(streamed(name, token_ids)) == "we"
    assert "".join(streamed(name, token_ids, is_continuation=True)) == " we"


def test_token_bytes_are_exact():
    tokenizer, vocabulary = TOKENIZERS["byte_level"], VOCABULARIES["byte_level"]
    token_ids = tokenizer.encode("hello wé🤖<eos>", add_special_tokens=False)
    assert b"".join(map(vocabulary.token_bytes, token_ids)) == "hello wé🤖<eos>".encode()
    assert vocabulary.token_bytes(10**6) == b""
    assert VOCABULARIES["byte_fallback"].token_bytes(1 + 0xE4) == b"\xe4"
    assert VOCABULARIES["word_piece"].token_bytes(1) == b"hello"


def scanned(text: str, stops: list[str]) -> tuple[str, bool]:
    """Reads one character after the other until some stop string is complete."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=300)
@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_before_the_first_completed_stop_comes_through_however_it_is_cut(pushes: list[str], stops: list[str]):
    scanner = StopScanner(stops)
    out = [scanner.push(push) for push in pushes]
    is_stopped = scanner.is_stopped
    out.append(scanner.finish())
    assert ("".join(out), is_stopped) == scanned("".join(pushes), stops)


def test_only_what_may_become_a_stop_is_held_back():
    scanner = StopScanner(["\nUser:"])
    assert [scanner.push(text) for text in ("Hi\n", "Us", "ing", "\nUser", ": no")] == ["Hi", "", "\nUsing", "", ""]
    assert scanner.is_stopped and scanner.push("more") == "" and scanner.finish() == ""
