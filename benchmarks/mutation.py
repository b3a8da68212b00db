"""Mutation testing of the certificates and projections: a seeded sample of cosmic-ray's mutants. See docs/mutation.md.

    pip install cosmic-ray && python benchmarks/mutation.py [COUNT [SEED [SESSION]]]

One mutant of each place and kind. Each is written into its module, the quickest tests that should fail are run, and the
module is put back. SESSION, a file, keeps the results: started again, it goes on.
"""

import ast
import collections
import random
import sys
from pathlib import Path

from cosmic_ray import plugins
from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.operators.operator import Operator
from cosmic_ray.work_db import use_db

LIMIT = 150  # seconds a mutant
TESTS = {  # files: tests
    "certificate": "certificate products project bounds: certificate_for or certificate_on or nothing_is or "
    "independent or rescale and (loop or takes_no or constraints or derivatives and 1) or every_chunk",
    "clip": "project products certificate: papers or nan-clip or test_vmap_is_a_loop[clip] or [float16-SAME-clip or "
    "rescale-float32 or clip and derivatives and not 1 or test_products and test_derivatives or "
    "takes_no_factorisation[clip] or exact_inside or has_its_derivative",
    "nearest": "project: closely or run_out or kernel_larger or saves or true_certificate or every_other or "
    "nan-project or [float16-SAME-project or taps_fold",
    "project": "errors project certificate: test_errors.py or [float16-SAME-project or [float16-SAME-rescale or "
    "saves or extreme or not_finite_gives or takes_no or exact_inside or every_other or geometry[1]",
    "bounds": "errors bounds report: test_errors.py or padding_float64 or does_not_divide or independent or "
    "own_size or against_dense[0] or against_dense[1] or bounds_hold and 1 or for_strides or next_larger",
    "products": "products: not test_every_geometry",
}
OPERATORS = """Add_Sub Sub_Add Mul_Div Div_Mul Pow_Mul FloorDiv_Div BitAnd_BitOr BitOr_BitAnd USub_UAdd Delete_USub
Lt_LtE Lt_Gt LtE_Lt LtE_GtE Gt_GtE Gt_Lt GtE_Gt GtE_LtE Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is Delete_Invert
AndWithOr OrWithAnd TrueWithFalse FalseWithTrue NumberReplacer AddNot SwapName""".split()
SWAPS = "minimum maximum min max all any argmax argmin ceil floor gcd lcm cos sin real imag".split()
SWAPS = dict(zip(SWAPS[::2], SWAPS[1::2])) | dict(zip(SWAPS[1::2], SWAPS[::2])) | {"conj": "copy", "sqrt": "abs"}


class SwapName(Operator):
    """``maximum`` in place of ``minimum``, and the like."""

    def mutation_positions(self, node):
        return [(node.start_pos, node.end_pos)] if node.type == "name" and node.value in SWAPS else []

    def mutate(self, node, index):
        node.value = SWAPS[node.value]
        return node

    examples = classmethod(lambda cls: ())


def left_out(source):
    """Where functions' headers, classes' bodies, errors' messages, stars and signs of constants begin and end."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            yield (min([node.lineno, *(item.lineno for item in node.decorator_list)]), 0), (node.body[0].lineno, 0)
        elif isinstance(node, (ast.ClassDef, ast.Raise)):
            yield (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
        elif isinstance(node, ast.Starred) or isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
            yield (node.lineno, node.col_offset), (node.lineno, node.col_offset + 1)


def sample(items, count, rng):
    places = collections.defaultdict(list)
    out = {path: list(left_out(path.read_text())) for path in {item.mutations[0].module_path for item in items}}
    for spec, item in sorted(((item.mutations[0], item) for item in items), key=lambda pair: str(pair[0])):
        inside = any(low <= spec.start_pos < high for low, high in out[spec.module_path])
        if spec.operator_name.endswith(tuple(OPERATORS)) and not inside:
            places[str(spec.module_path), spec.start_pos, "Number" in spec.operator_name].append(item)
    return rng.sample([rng.choice(places[place]) for place in sorted(places)], count)


def main(count="140", seed="0", session="mutation.sqlite"):
    plugins.OPERATOR_PROVIDERS["own"] = {"SwapName": SwapName}
    commands = {}
    for name, (files, tests) in ((name, tests.split(": ")) for name, tests in TESTS.items()):
        files = " ".join(f"tests/test_{file}.py" for file in files.split())
        pytest = f"{sys.executable} -m pytest -n 0 -p no:cacheprovider -x -q"
        commands[Path(f"opnorm_jax/_{name}.py")] = f"{pytest} {files} -k '{tests}'"
    with use_db(session) as db:
        if not db.num_work_items:
            init(commands, db, {})
            picked = sample(db.work_items, int(count), random.Random(int(seed)))
            db.clear()
            db.add_work_items(picked)
        for command in commands.values():
            assert mutate_and_test([], command, None).test_outcome == "survived", command
        for item in db.pending_work_items:
            path = item.mutations[0].module_path
            result = mutate_and_test(item.mutations, commands[path], LIMIT)
            db.set_result(item.job_id, result)
            outcome = "timed out" if result.output == "timeout" else result.test_outcome.value
            print(f"{outcome}: {path}:{item.mutations[0].start_pos[0]}\n{result.diff}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
