"""Mutation testing of the modules that certify: a seeded sample of cosmic-ray's mutants, and the page on the result.

    pip install cosmic-ray && python benchmarks/mutation.py [COUNT [SEED [FOLDER [MODULE ...]]]]

At most COUNT mutants a module (of all in TESTS, if none is named), one of each place and kind. Each is written into
its module, the quick tests that should fail are run, and the module is put back. FOLDER keeps the results, a pair of
files for each module: started again, the command goes on where it was stopped. After every module docs/mutation.md is
written anew from all results in FOLDER, with the verdicts on survivors that mutation_verdicts.json holds. Modules of
which FOLDER holds nothing keep their lines.
"""

import ast
import collections
import json
import platform
import random
import sys
from importlib.metadata import version
from pathlib import Path

from cosmic_ray import plugins
from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.operators.operator import Operator
from cosmic_ray.work_db import use_db

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300  # seconds of CPU time a mutant
TESTS = {  # module: files of tests; an expression for -k after a colon
    "_geometry": "kernel/test_geometry kernel/test_errors kernel/test_bounds",
    "_rounding": "kernel/test_precision kernel/test_bounds kernel/test_inside: allowance or bound or inside",
    "_blocks/symbol": "kernel/test_dense kernel/test_spectrum: dense or paper or circular or geometry",
    "_blocks/factor": "blocks/test_factor kernel/test_second_derivatives",
    "_blocks/largest": "blocks/test_largest",
    "_blocks/products": "blocks/test_products: not test_every_geometry",
    "_blocks/clip": "kernel/test_project blocks/test_products: papers or clip",
    "_kernel/bounds": "kernel/test_bounds kernel/test_tight kernel/test_errors tree/test_report",
    "_kernel/norm": "kernel/test_bounds kernel/test_second_derivatives kernel/test_spectrum",
    "_kernel/inside": "kernel/test_inside kernel/test_second_derivatives",
    "_kernel/clip": "kernel/test_project kernel/test_inside: papers or clip",
    "_kernel/nearest": "kernel/test_project: not extreme",
    "_kernel/constrain": "kernel/test_project kernel/test_errors kernel/test_inside tree/test_transform",
    "_kernel/prepare": "kernel/test_precision kernel/test_bounds",
    "_kernel/dense": "kernel/test_tight",
    "_kernel/inverse": "kernel/test_inverse",
    "_kernel/two_sided": "kernel/test_two_sided",
    "_kernel/steepest": "kernel/test_steepest",
    "_kernel/smallest": "kernel/test_smallest",
    "_tree/radius": "tree/test_radius",
    "_tree/landing": "tree/test_landing: taps_alone or casts or foreseen or nothing_else or 1e7 or 1000.0",
    "_tree/transform": "tree/test_landing tree/test_tree_errors tree/test_transform",
    "_program/movement": "program/test_movement program/test_find_convs",
    "_program/convolution": "program/test_find_convs program/test_tied",
    "_program/kernels": "program/test_stacks program/test_tied program/test_find_convs",
    "_program/find_convs": "program/test_find_convs program/test_stacks program/test_reported_programs",
    "_program/signals": "program/test_lipschitz program/test_reported_programs program/test_random_programs",
    "_program/lipschitz": "program/test_lipschitz program/test_reported_programs",
    "_program/jaxpr": "program/test_lipschitz program/test_find_convs",
    "_program/follow": "program/test_find_convs program/test_stacks program/test_reported_programs",
    "_program/values": "program/test_find_convs program/test_tied program/test_reported_programs",
    "_program/numbers": "program/test_numbers program/test_lipschitz program/test_reported_programs",
    "_program/ranges": "program/test_gates",
    "_program/rules": "program/test_lipschitz program/test_gates program/test_random_programs",
    "_program/slopes": "program/test_slopes program/test_lipschitz",
    "_program/sdp": "program/test_random_networks program/test_lipschitz",
    "_program/cuts": "program/test_random_networks program/test_lipschitz",
    "_program/reader": "program/test_random_networks program/test_lipschitz",
    "_program/stages": "program/test_random_networks program/test_lipschitz",
}
OPERATORS = """Add_Sub Sub_Add Mul_Div Div_Mul Pow_Mul FloorDiv_Div BitAnd_BitOr BitOr_BitAnd USub_UAdd Delete_USub
Lt_LtE Lt_Gt LtE_Lt LtE_GtE Gt_GtE Gt_Lt GtE_Gt GtE_LtE Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is Delete_Invert
AndWithOr OrWithAnd TrueWithFalse FalseWithTrue NumberReplacer AddNot SwapName""".split()
SWAPS = "minimum maximum min max all any argmax argmin ceil floor gcd lcm cos sin real imag".split()
SWAPS = dict(zip(SWAPS[::2], SWAPS[1::2])) | dict(zip(SWAPS[1::2], SWAPS[::2])) | {"conj": "copy", "sqrt": "abs"}
PAGE = ROOT / "docs" / "mutation.md"
BAR = "\\|"  # in a table
VERDICTS = Path(__file__).with_name("mutation_verdicts.json")


class SwapName(Operator):
    """``maximum`` in place of ``minimum``, and the like."""

    def mutation_positions(self, node):
        return [(node.start_pos, node.end_pos)] if node.type == "name" and node.value in SWAPS else []

    def mutate(self, node, index):
        node.value = SWAPS[node.value]
        return node

    examples = classmethod(lambda cls: ())


def left_out(source):
    """Yields where functions' headers, classes' bodies, errors' messages and signs of constants begin and end."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            yield (min([node.lineno, *(item.lineno for item in node.decorator_list)]), 0), (node.body[0].lineno, 0)
        elif isinstance(node, (ast.ClassDef, ast.Raise)):
            yield (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
        elif isinstance(node, ast.Starred) or isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
            yield (node.lineno, node.col_offset), (node.lineno, node.col_offset + 1)


def sample(items, count, rng):
    """Draws a module's mutants: one of each place and kind, then ``count`` of those; counts the places too."""
    out = list(left_out(items[0].mutations[0].module_path.read_text()))
    places = collections.defaultdict(list)
    for spec, item in sorted(((item.mutations[0], item) for item in items), key=lambda pair: str(pair[0])):
        inside = any(low <= spec.start_pos < high for low, high in out)
        if spec.operator_name.endswith(tuple(OPERATORS)) and not inside:
            places[spec.start_pos, "Number" in spec.operator_name].append(item)
    singles = [rng.choice(places[place]) for place in sorted(places)]
    return rng.sample(singles, min(count, len(singles))), len(singles)


def command(tests):
    """Returns the command that runs a module's tests."""
    files, _, expression = tests.partition(": ")
    files = " ".join(f"tests/{file}.py" for file in files.split())
    chosen = f' -k "{expression}"' if expression else ""
    pytest = f'{sys.executable} -m pytest -n 0 -p no:cacheprovider -x -q -m "not slow" {files}{chosen}'
    return f"bash -c 'ulimit -t {LIMIT}; exec {pytest}'"


def change(diff):
    """Returns the changed line of a mutant's diff, before and after."""
    lines = [line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return " => ".join(line[1:].strip() for line in lines[:2])


def enclosing(source, line):
    """Returns the name of the innermost function around a line, or of the constant that the line defines."""
    around = [
        node for node in ast.walk(ast.parse(source)) if getattr(node, "lineno", line + 1) <= line <= node.end_lineno
    ]
    functions = [node.name for node in around if isinstance(node, ast.FunctionDef)]
    constants = [node.targets[0].id for node in around if isinstance(node, ast.Assign) and not functions]
    return (functions or constants or [""])[-1]


COUNTS = "places", "changes", "killed", "timed out", "survived", "judged"


def kept(text):
    """Returns from a page each module's counts, and its lines in the table of survivors."""
    counts, survivors = {}, collections.defaultdict(list)
    for line in text.splitlines():
        if line.startswith("| `"):
            module, numbers = line.split("`")[1], line.split("|")[2:-1]
            if len(numbers) == len(COUNTS) and all(number.strip().isdigit() for number in numbers):
                counts[module] = collections.Counter(dict(zip(COUNTS, map(int, numbers))))
            else:
                survivors[module].append(line)
    return counts, survivors


def page(states, seed):
    """Returns docs/mutation.md: the counts of each module, and every survivor with its verdict."""
    verdicts = json.loads(VERDICTS.read_text()) if VERDICTS.exists() else {}
    versions = ", ".join(f"{name} {version(name)}" for name in ("cosmic-ray", "jax", "numpy", "pytest"))
    lines = [
        "# Mutation testing",
        "",
        "What the tests notice when the code that certifies is wrong. This page is written by one command, which makes",
        "small changes of each module, runs the module's quick tests, and lists every change that no test noticed:",
        "",
        "```bash",
        'pip install -e ".[test]" cosmic-ray',
        "python benchmarks/mutation.py",
        "```",
        "",
        f"{versions}, Python {platform.python_version()}, seed {seed}. The changes are of operators, comparisons,",
        "numbers (by 1), conditions (negated), booleans, and exchanged names (`maximum` for `minimum`, `any` for",
        "`all`, a missing `conj`): a sample of all places, one change of each place and kind. Headers, bodies of",
        f"classes and errors are left out. Tests that take more than {LIMIT} s of CPU time count as timed out.",
        '"Killed since" names the file of a test that notices the change and was added after the run.',
        "",
        "| module | places | changes | killed | timed out | survived | of these judged |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    counts, survivors = kept(PAGE.read_text() if PAGE.exists() else "")
    for module, state in states.items():
        outcomes = collections.Counter(outcome for *_, outcome in state["results"])
        alive = [(place, change(diff)) for place, diff, outcome in state["results"] if outcome == "survived"]
        judged = sum(f"{module}: {text}" in verdicts for _, text in alive)
        counts[module] = outcomes + collections.Counter(
            {"places": state["places"], "changes": len(state["results"]), "judged": judged}
        )
        verdict = lambda text, module=module: verdicts.get(f"{module}: {text}", "not judged yet")
        survivors[module] = [
            f"| `{module}` `{place}` | `{text.replace('|', BAR)}` | {verdict(text)} |" for place, text in alive
        ]
    counts = {module: counts[module] for module in TESTS if module in counts}
    counts["all"] = sum(counts.values(), collections.Counter())
    for module, numbers in counts.items():
        name = module if module == "all" else f"`{module}`"
        lines.append(f"| {name} | " + " | ".join(str(numbers[name]) for name in COUNTS) + " |")
    lines += ["", "| survivor | change | verdict |", "| --- | --- | --- |"]
    lines += [line for module in TESTS for line in survivors[module]]
    return "\n".join(lines) + "\n"


def attack(name, count, seed, folder):
    """Runs what is left of a module's session."""
    path, notes = Path(f"opnorm_jax/{name}.py"), folder / f"{name.replace('/', '.')}.json"
    with use_db(str(notes.with_suffix(".sqlite"))) as db:
        if not notes.exists():
            init({path: ""}, db, {})
            drawn, places = sample(list(db.work_items), count, random.Random(seed))
            db.clear()
            db.add_work_items(drawn)
            notes.write_text(json.dumps({"places": places, "results": []}))
        state, tests = json.loads(notes.read_text()), command(TESTS[name])
        pending = list(db.pending_work_items)
        assert not pending or mutate_and_test([], tests, None).test_outcome == "survived", tests
        for item in pending:
            result = mutate_and_test(item.mutations, tests, 10 * LIMIT)
            outcome = "timed out" if result.output == "timeout" else result.test_outcome.value
            place = enclosing(path.read_text(), item.mutations[0].start_pos[0])
            state["results"].append([place, result.diff, outcome])
            notes.write_text(json.dumps(state))
            db.set_result(item.job_id, result)
            print(f"{outcome}: {path}, {place}\n{result.diff}", flush=True)


def main(count="12", seed="0", folder="mutation", *chosen):
    """Runs what is left of each module's session, and writes the page."""
    plugins.OPERATOR_PROVIDERS["own"] = {"SwapName": SwapName}
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    for name in chosen or TESTS:
        attack(name, int(count), int(seed), folder)
        notes = {module: folder / f"{module.replace('/', '.')}.json" for module in TESTS}
        states = {module: json.loads(path.read_text()) for module, path in notes.items() if path.exists()}
        PAGE.write_text(page(states, seed))


if __name__ == "__main__":
    main(*sys.argv[1:])
