"""Docstrings are sentences or imperatives, in the field's plain terms.

The docstring of a function begins with a verb in the imperative, is a sentence, or has the form
`inputs -> outputs`. Those of modules, classes and attributes may be titles, and those of tests add
to the test's name; none begins as a fragment of a sentence."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

FOLDERS = ("megatron_hypenet", "launchers", "tools", "slurm", "examples", "tests")
FRAGMENT = re.compile(r"\s*(Of|Those|That|For)\b")

IMPERATIVES = set(
    """
Abort Accept Access Accumulate Act Add Adopt Advance Align Allgather Allocate Allow Announce
Answer Append Apply Arm Arrange Ask Assemble Assert Assign Attach Attempt Attend Average Avoid
Await Back Backpropagate Balance Batch Begin Bind Block Blur Bound Branch Break Bring Broadcast
Build Bump Cache Call Cancel Capture Carry Cast Catch Change Check Choose Clean Clear Clip Clone
Close Collect Combine Commit Compare Compile Complete Compute Concatenate Configure Confirm
Connect Consume Continue Convert Convolve Copy Corrupt Count Cover Crash Create Cut Damage
Decide Declare Decode Delete Deliver Demand Derive Describe Detach Detect Differentiate Disable
Discard Disconnect Dispatch Display Distil Distribute Divide Do Double Download Drain Draw Drive
Drop Emit Enable Encode Encrypt End Enforce Ensure Enter Enumerate Equip Escape Estimate
Evaluate Exchange Exclude Exec Execute Exercise Exhaust Exit Expand Expect Explain Export Extend
Extract Fail Fetch Fill Find Finish Fit Flatten Flush Fold Follow Force Forget Format Forward
Free Freeze Fuse Gather Generate Get Give Go Group Guard Halve Hand Handle Hang Hash Have Help
Hide Hold Hook Identify Ignore Imitate Import Include Increment Index Infer Init Initialise
Inject Insert Inspect Install Interpret Interrupt Invoke Iterate Join Judge Jump Keep Kill
Launch Lay Lead Leak Learn Leave Let Lift Limit Line Link List Live Load Lock Log Look Lower
Make Mangle Map Mark Mask Match Measure Merge Mimic Mirror Mount Move Multiply Name Need Negate
Nest Normalise Note Notify Observe Obtain Offer Omit Open Order Override Overwrite Own Pack Pad
Parse Pass Patch Perform Permute Persist Pick Pin Place Plan Plant Plot Point Poll Pop Post
Predict Prefer Prefix Prepare Prepend Preserve Press Pretend Prevent Print Probe Process Profile
Project Prompt Propose Provide Prune Publish Pull Push Put Quantize Query Quote Raise Rank Rate
Reach React Read Rebuild Receive Recompute Record Recover Recreate Redirect Redo Reduce Refer
Refill Refresh Refuse Regard Register Reject Release Rely Remember Remove Rename Render Reorder
Repair Repeat Replace Replay Report Reproduce Request Requeue Require Rerun Rescale Reserve
Reset Reshape Resolve Restart Restore Resume Retry Return Reuse Reverse Rewrite Roll Rotate
Round Route Run Sample Sanitize Save Say Scale Scan Scatter Score Search See Seed Seek Select
Send Separate Serve Set Settle Shard Share Shift Shorten Show Sign Signal Silence Simplify
Simulate Skip Sleep Slice Solve Sort Spawn Speak Spell Split Spread Stack Stamp Stand Start
State Stay Step Stop Store Stream Strip Stub Submit Substitute Subtract Suggest Sum Summarise
Supply Suppress Surround Swallow Swap Sweep Switch Synchronise Take Tell Terminate Test Tie Tile
Time Tokenize Touch Trace Track Train Transfer Translate Transpose Treat Trigger Trim Truncate
Try Turn Type Understand Undo Unfreeze Unlink Unpack Unset Update Use Validate Vary Verify View
Visit Wait Wake Walk Warm Warn Watch Weigh Weight Wipe Wire Wrap Write Yield Zero Zip
""".split()
)
"""Add the verb of a new docstring where it is missing."""

FINITE = set(
    """
is are was were has have had can cannot must may might will would should could does do becomes
become gives give takes take holds hold keeps keep gets get comes come goes go makes make says
say returns raises reads writes runs trains computes adds leaves leave stays stay follows follow
begins begin belongs depends differs differ equals contains covers means needs replaces restores
moves sends receives passes pass gathers reduces sums loads saves skips stops waits knows sees
lies lie stands stand exist exists fails fit fits happens remains repeats requires uses
""".split()
)
"""Verbs of a main clause; those of "that", "which" or "where" make no sentence of a phrase."""

SUBORDINATE = set(
    "that which who whose where when whether what how if as while than because until before after "
    "unless whom".split()
)

# private metaphors and former names, each with the plain term
REFUSED = {
    "desk job": "work on files alone",
    "door": "place, package or function",
    "drawer": "a function that draws",
    "house": "package or code",
    "imitation": "alignment",
    "in vain": "without an answer",
    "mentor": "teacher",
    "nursery": "process that is killed",
    "quieten": "configure logging",
    "told apart": "distinguished",
}
ODD_WORD = re.compile(rf"(?<![a-z])({'|'.join(REFUSED)})s?(?![a-z])", re.IGNORECASE)


@cache
def tree_of(path: Path) -> ast.Module:
    """Parse a file once for all tests here."""
    return ast.parse(path.read_text(encoding="utf-8"))


def docstrings(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.Expr, str]]:
    """Yield (what has the docstring, its statement, its text), of attributes too."""
    nodes: list[ast.AST] = [tree]
    for node in nodes:
        for field in ("body", "orelse", "finalbody", "handlers"):
            statements = getattr(node, field, None)
            for statement in statements if isinstance(statements, list) else ():
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    text = statement.value.value
                    if isinstance(text, str):
                        yield node, statement, text
                else:
                    nodes.append(statement)


def is_sentence(text: str) -> bool:
    """Return whether the first clause begins with an imperative, is `inputs -> outputs`, or has
    more finite verbs than words that begin a subordinate clause."""
    line = " ".join(text.split())
    first, _, rest = line.partition(" ")
    if first.rstrip(",:;.") in IMPERATIVES and not rest.startswith("of "):
        return True
    clause = re.split(r"[.;:!?](?:\s|$)", line, maxsplit=1)[0]
    if "->" in clause and not first.istitle():
        return True
    words = re.findall(r"[a-z]+", re.sub(r"`[^`]*`", "", clause).lower())
    return sum(word in FINITE for word in words) > sum(word in SUBORDINATE for word in words)


def phrases(tree: ast.Module) -> list[int]:
    """Return the lines of functions' docstrings that are no sentence; tests are left out."""
    return [
        statement.lineno
        for node, statement, text in docstrings(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and statement is node.body[0]
        and not node.name.startswith("test_")
        and not is_sentence(text)
    ]


def fragments(tree: ast.Module) -> list[int]:
    """Return the lines of docstrings that begin with a word of FRAGMENT."""
    return [item.lineno for _, item, text in docstrings(tree) if FRAGMENT.match(text)]


@pytest.mark.parametrize("find", [fragments, phrases])
@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_are_sentences(repo_root, folder, find):
    found = [
        f"{path.relative_to(repo_root)}:{line}"
        for path in sorted((repo_root / folder).rglob("*.py"))
        for line in find(tree_of(path))
    ]
    assert not found, "begin with what the function does, or write a sentence with a verb"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Return the sum.", True),
        ("Of a value.", False),
        ("Number of values that a rank holds.", False),
        ("Sum of `has` over ranks; returns it.", False),
        ("Sum x over ranks.", True),
        ("What the loop needs.", False),
        ("q, k [b, t, h] -> o [b, t, h].", True),
        ("Every stage has a layer.", True),
        ("`path` is a folder; its files are read.", True),
        ("The tokens that a rank holds are in order.", True),
        ("As in the base class.", False),
    ],
)
def test_phrases_are_told_from_sentences(text, right):
    source = ast.parse(f'def f():\n    """{text}"""\n')
    assert phrases(source) == ([] if right else [2])


def test_fragments_are_caught():
    source = 'x = 1\n"""Of a value."""\n\n\ndef f():\n    """Those that remain."""\n'
    assert fragments(ast.parse(source)) == [2, 6]
    assert fragments(ast.parse('def f():\n    """Format it."""\n')) == []


def odd_words(text: str) -> list[str]:
    """Return the entries of REFUSED in a text, in names too: `_door` counts."""
    plain = text.replace("_", " ")
    return [match.group(1).lower() for match in ODD_WORD.finditer(plain)]


def test_private_metaphors_stay_out(repo_root):
    paths = [repo_root / "README.md", repo_root / "CONTRIBUTING.md"]
    for folder in ("docs", *FOLDERS):
        paths += [
            path
            for ending in ("*.py", "*.md", "*.sh", "*.j2")
            for path in (repo_root / folder).rglob(ending)
            if path != Path(__file__)
        ]
    found = {
        str(path.relative_to(repo_root)): {word: REFUSED[word] for word in words}
        for path in paths
        if (words := odd_words(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_a_planted_metaphor_is_caught():
    assert odd_words("the one door to it, _Doors") == ["door", "door"]
    assert odd_words("for find in told_apart(x):") == ["told apart"]
    assert odd_words("indoors, a warehouse") == []
