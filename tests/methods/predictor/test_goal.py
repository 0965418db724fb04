"""Goals: the grammar against Python's own arithmetic, the canonical text, the split, and every refusal."""

from __future__ import annotations

import math
import operator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sedimo.errors import InputError
from sedimo.methods.predictor.goal import MAX_DEPTH, MAX_LENGTH, Goal
from tolerances import FLOAT64_FORMULA

MEASURES = {"fid": 20.0, "sqnr_db": 12.5, "avg_bits": 4.0, "_x1": -0.75}
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


few_examples = settings(max_examples=50)  # large ones, drawn slowly


def numbers():
    return st.sampled_from(["0", "3", "150", "2.", ".5", "0.25", "1e3", "2.5E-2", "7e+1"]).map(lambda t: (t, float(t)))


def chains(parts, signs):
    """Text and value of parts with operators between them, computed from the left as Python does."""

    def join(first, rest, space):
        text, value = first
        for sign, (part, number) in rest:
            text += f"{space}{sign}{space}{part}"
            if value is not None and number is not None:
                value = None if sign == "/" and number == 0 else OPERATORS[sign](value, number)
            else:
                value = None
        return text, value

    rest = st.lists(st.tuples(st.sampled_from(signs), parts), max_size=2)
    return st.builds(join, parts, rest, st.sampled_from(["", " "]))


def calls(inner):
    def one(name, rule, argument):
        text, value = argument
        return f"{name}({text})", None if value is None or not rule(value) else getattr(math, name)(value)

    def two(function, a, b):
        text = f"{function.__name__}({a[0]}, {b[0]})"
        return text, None if a[1] is None or b[1] is None else function(a[1], b[1])

    return st.one_of(
        st.builds(one, st.just("log10"), st.just(lambda v: v > 0), inner),
        st.builds(one, st.just("sqrt"), st.just(lambda v: v >= 0), inner),
        st.builds(two, st.sampled_from([min, max]), inner, inner),
    )


def signed(atoms):
    negative = atoms.map(lambda a: (f"-{a[0]}", None if a[1] is None else -a[1]))
    return st.one_of(atoms, negative)


def sums(atoms):
    return chains(chains(signed(atoms), "*/"), "+-")


def expressions(names):
    leaves = st.one_of(numbers(), st.sampled_from([(name, MEASURES[name]) for name in names]))
    inside = st.recursive(
        leaves,
        lambda inner: st.one_of(sums(inner).map(lambda e: (f"({e[0]})", e[1])), calls(sums(inner))),
        max_leaves=3,
    )
    return sums(inside)


EXPRESSIONS = expressions(sorted(MEASURES))
WITHOUT_BITS = expressions(["fid", "sqnr_db", "_x1"])


def parse_if_short(text):
    assume(len(text) < MAX_LENGTH / 2)  # the canonical text has more spaces
    return Goal.parse(text)


@few_examples
@given(EXPRESSIONS)
def test_value_is_that_of_python(expression):
    text, value = expression
    target = parse_if_short(text)
    if value is None or not math.isfinite(value):
        with pytest.raises(InputError, match="no finite value"):
            target.value(MEASURES)
    else:
        assert target.value(MEASURES) == value


@few_examples
@given(EXPRESSIONS)
def test_canonical_text_reads_back_as_an_equal_target(expression):
    target = parse_if_short(expression[0])
    again = Goal.parse(str(target))
    assert again == target
    assert hash(again) == hash(target)
    assert str(again) == str(target)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("-fid-150*avg_bits", "-fid - 150 * avg_bits"),
        (" ( (fid) ) ", "fid"),
        ("(a*b)/c", "a * b / c"),
        ("a*(b/c)", "a * (b / c)"),
        ("a-(b-c)", "a - (b - c)"),
        ("(a-b)-c", "a - b - c"),
        ("-(a*b)", "-(a * b)"),
        ("(-a)*b", "-a * b"),
        ("a--b", "a - -b"),
        ("min( a,max(b , 1e20))", "min(a, max(b, 1e+20))"),
        ("0.1+.5", "0.1 + 0.5"),
    ],
)
def test_canonical_text(text, canonical):
    assert str(Goal.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-fid - 150*avg_bits", -620.0),
        ("sqnr_db - 10*avg_bits", -27.5),
        ("2 - 3 - 4", -5.0),
        ("16 / 4 / 2", 2.0),
        ("2 + 3 * 4", 14.0),
        ("-2 * -3", 6.0),
        ("log10(100 * sqrt(fid * 5))", 3.0),
        ("min(fid, max(3, avg_bits))", 4.0),
    ],
)
def test_value(text, value):
    assert Goal.parse(text).value(MEASURES) == value


def test_names_are_the_measures_of_the_expression():
    assert Goal.parse("-fid - 150*avg_bits + log10(max(lpips, 2))").names == {"fid", "avg_bits", "lpips"}
    assert Goal.parse("1 + 2").names == frozenset()


def test_both_words_for_bits_are_one_measure():
    assert Goal.parse("2 * avg_bits").value({"paper_bits": 3.5}) == 7
    assert Goal.parse("2 * paper_bits").value({"avg_bits": 3.5}) == 7
    assert Goal.parse("avg_bits").value({"avg_bits": 3.0, "paper_bits": 9.0}) == 3


def test_missing_measure_is_named_with_those_that_exist():
    with pytest.raises(InputError, match=r"'lpips', which is not recorded\. There are avg_bits, fid\."):
        Goal.parse("-fid - lpips").value({"fid": 1.0, "avg_bits": 4.0})
    with pytest.raises(InputError, match="There are none"):
        Goal.parse("fid").value({})


@pytest.mark.parametrize("found", [math.inf, math.nan])
def test_measure_that_is_not_finite_is_refused(found):
    with pytest.raises(InputError, match="finite measures, got fid="):
        Goal.parse("min(fid, 3)").value({"fid": found})


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("1 + fid / (avg_bits - 4)", r"'fid / \(avg_bits - 4\)' has no finite value: / of 20 and 0\."),
        ("3 * log10(fid - 20)", r"'log10\(fid - 20\)' has no finite value: log10 of 0\."),
        ("log10(0 - fid)", "log10 of -20"),
        ("sqrt(-fid)", r"'sqrt\(-fid\)'"),
        ("1e308 * fid", r"'1e\+308 \* fid'"),
        ("min(1e308 + 1e308, 3)", r"'1e\+308 \+ 1e\+308'"),
    ],
)
def test_step_without_a_finite_result_is_named(text, place):
    with pytest.raises(InputError, match=place):
        Goal.parse(text).value(MEASURES)


@pytest.mark.parametrize(
    ("text", "rest", "coefficient"),
    [
        ("-fid - 150*avg_bits", "-fid", -150.0),
        ("sqnr_db - 10*paper_bits", "sqnr_db", -10.0),
        ("-fid - 150*avg_bits + lpips", "-fid + lpips", -150.0),
        ("avg_bits", "0", 1.0),
        ("-150 * avg_bits", "0", -150.0),
        ("-fid", "-fid", 0.0),
        ("avg_bits - fid", "-fid", 1.0),
        ("fid - (lpips + avg_bits/4)", "fid - lpips", -0.25),
        ("2 * (avg_bits - fid) / 4", "2 * -fid / 4", 0.5),
        ("-(fid + sqrt(4) * avg_bits)", "-fid", -2.0),
        ("avg_bits + fid + paper_bits*3", "fid", 4.0),
        ("avg_bits * (1 + 2) - 1", "-1", 3.0),
    ],
)
def test_split_bits(text, rest, coefficient):
    found, factor = Goal.parse(text).split_bits()
    assert str(found) == rest
    assert factor == coefficient


@few_examples
@given(
    WITHOUT_BITS,
    st.sampled_from(["avg_bits", "2*paper_bits", "-(avg_bits/8 - 1)*3"]),
    st.sampled_from("+-"),
    st.booleans(),
)
def test_split_parts_add_up_to_the_whole(expression, bits, sign, is_first):
    text, value = expression
    assume(value is not None and abs(value) < 1e6)
    whole = parse_if_short(f"{bits} {sign} ({text})" if is_first else f"({text}) {sign} {bits}")
    rest, coefficient = whole.split_bits()
    assert rest.names.isdisjoint({"avg_bits", "paper_bits"})
    total = rest.value(MEASURES) + coefficient * MEASURES["avg_bits"]
    assert total == pytest.approx(whole.value(MEASURES), rel=FLOAT64_FORMULA, abs=FLOAT64_FORMULA)


@pytest.mark.parametrize(
    "text",
    [
        "fid * avg_bits",
        "avg_bits * 2 * fid",
        "avg_bits * avg_bits",
        "fid / avg_bits",
        "1 / avg_bits",
        "avg_bits / fid",
        "avg_bits / 0",
        "-fid - sqrt(avg_bits)",
        "max(avg_bits, 3)",
        "fid + (avg_bits + 1) * (fid + 1)",
    ],
)
def test_split_refuses_bits_that_are_not_a_term(text):
    with pytest.raises(InputError, match=r"number \* avg_bits"):
        Goal.parse(text).split_bits()


def test_split_refuses_an_endless_coefficient():
    with pytest.raises(InputError, match="coefficient of avg_bits must be finite"):
        Goal.parse("1e300 * (1e300 * avg_bits)").split_bits()


@pytest.mark.parametrize(
    ("text", "rule", "place"),
    [
        ("", "invalid syntax", 1),
        ("   ", "invalid syntax", 1),
        ("fid +", "invalid syntax", 6),
        ("fid ^ 2", "no such character is known, got '^'", 5),
        ("fid ; import os", "no such character is known, got ';'", 5),
        ("fid\N{MINUS SIGN}3", "no such character is known, got '\N{MINUS SIGN}'", 4),
        ("'fid'", 'no such character is known, got "\'"', 1),
        ("a[0]", "no such character is known, got '['", 2),
        ("fid # 2", "no such character is known, got '#'", 5),
        ("3 - fid ** 2", "'fid ** 2' is no arithmetic", 5),
        ("3 - fid // 2", "'fid // 2' is no arithmetic", 5),
        ("+fid", "'+fid' is no arithmetic", 1),
        ("2fid", "invalid decimal literal", 1),
        ("1or 2", "invalid decimal literal", 1),
        ("fid lpips", "invalid syntax", 5),
        ("fid)", "unmatched ')'", 4),
        ("fid, 2", "'fid, 2' is no arithmetic", 1),
        ("(fid", "'(' was never closed", 1),
        ("a) + (b", "unmatched ')'", 2),
        ("()", "'()' is no arithmetic", 1),
        ("log10 fid", "invalid syntax", 7),
        ("2 * log10", "'log10' is no arithmetic", 5),
        ("2 * min(1)", "'min(1)' is no arithmetic", 5),
        ("min(1, 2, 3)", "'min(1, 2, 3)' is no arithmetic", 1),
        ("min(*fid)", "'min(*fid)' is no arithmetic", 1),
        ("min(*fid, 2)", "'*fid' is no arithmetic", 5),
        ("sqrt()", "'sqrt()' is no arithmetic", 1),
        ("sqrt(a for a in b)", "is no arithmetic", 5),
        ("exec(1)", "'exec(1)' is no arithmetic", 1),
        ("fid.real", "'fid.real' is no arithmetic", 1),
        ("a if b else c", "'a if b else c' is no arithmetic", 1),
        ("a or b", "'a or b' is no arithmetic", 1),
        ("not a", "'not a' is no arithmetic", 1),
        ("True", "'True' is no arithmetic", 1),
        ("...", "'...' is no arithmetic", 1),
        ("fid + 1j", "'1j' is no arithmetic", 7),
        ("fid + 0x1", "'0x1' is no arithmetic", 7),
        ("fid + 1_0", "'1_0' is no arithmetic", 7),
        ("3 + 1e999", "a number must be finite", 5),
    ],
)
def test_what_cannot_be_read_is_refused_with_place_and_remedy(text, rule, place):
    with pytest.raises(InputError) as refused:
        Goal.parse(text)
    message = str(refused.value)
    assert rule in message
    assert f"at character {place}. Use measures, numbers, + - * /" in message


def test_length_is_limited_as_given_and_as_canonical_text():
    assert Goal.parse("a" * MAX_LENGTH).names == {"a" * MAX_LENGTH}
    with pytest.raises(InputError, match=f"at most {MAX_LENGTH} characters.*got {MAX_LENGTH + 1}"):
        Goal.parse("a" * (MAX_LENGTH + 1))
    with pytest.raises(InputError, match="one space around each sign, got 237"):
        Goal.parse("+".join("1" * 60))


@pytest.mark.parametrize(("opening", "closing"), [("-", ""), ("sqrt(", ")"), ("-(", ")")])
def test_depth_is_limited(opening, closing):
    def nested(times):
        return opening * times + "a" + closing * times

    assert Goal.parse(nested(MAX_DEPTH - 1)).names == {"a"}
    with pytest.raises(InputError, match=f"nested {MAX_DEPTH} deep"):
        Goal.parse(nested(MAX_DEPTH))


def test_superfluous_parentheses_do_not_count():
    assert str(Goal.parse("(" * 99 + "a" + ")" * 99)) == "a"


def test_text_that_is_not_canonical_is_refused():
    with pytest.raises(InputError, match=r"the target 'fid\+1' is written 'fid \+ 1'\. Make"):
        Goal("fid+1")
