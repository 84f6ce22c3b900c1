from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.text.stops import StopStrings

TEXT = st.text(alphabet="ab\n", max_size=40)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), min_size=1, max_size=4)


def run(stops, pieces):
    """(text that went out, stopped?) of feeding `pieces` until a stop, then finishing."""
    matcher = StopStrings(stops)
    out = ""
    for piece in pieces:
        text, stopped = matcher.feed(piece)
        out += text
        if stopped:
            return out, True
    return out + matcher.finish(), False


def expected(stops, text):
    """The slow obvious way: the first position at which some stop string is complete."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(STOPS, TEXT, st.data())
@settings(max_examples=400, deadline=None)
def test_cuts_where_the_first_stop_string_completes_however_the_text_is_split(stops, text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert run(stops, pieces) == expected(stops, text)


@given(STOPS, TEXT)
@settings(max_examples=300, deadline=None)
def test_holds_back_only_what_could_still_become_a_stop_string(stops, text):
    matcher = StopStrings(stops)
    out = ""
    for end, char in enumerate(text, start=1):
        piece, stopped = matcher.feed(char)
        if stopped:
            return
        out += piece
        held = text[len(out) : end]
        assert out + held == text[:end]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_a_prefix_that_turns_out_harmless_is_released_at_once():
    matcher = StopStrings(["\n\nUser:"])
    assert matcher.feed("Hi\n\nUse") == ("Hi", False)
    assert matcher.feed("d it") == ("\n\nUsed it", False)


def test_overlapping_starts_are_seen():
    assert run(["aab"], ["a", "a", "a", "b"]) == ("a", True)
