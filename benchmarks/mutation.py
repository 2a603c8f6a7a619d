"""Small faults for a source file: where, and which. Transforms text; runs nothing.

A place is a node of the syntax tree with its possible replacements. What no test should check is excluded:
docstrings, annotations, imports, texts of errors and of output, `__all__`, blocks for type checkers and for
scripts.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
NAMES = {
    'min': 'max',
    'max': 'min',
    'amin': 'amax',
    'amax': 'amin',
    'minimum': 'maximum',
    'maximum': 'minimum',
    'any': 'all',
    'all': 'any',
    'floor': 'ceil',
    'ceil': 'floor',
    'sum': 'mean',
    'mean': 'sum',
    'argmin': 'argmax',
    'argmax': 'argmin',
    'sin': 'cos',
    'cos': 'sin',
    'zeros': 'ones',
    'ones': 'zeros',
    'zeros_like': 'ones_like',
    'ones_like': 'zeros_like',
    'sqrt': 'square',
    'square': 'sqrt',
    'rfind': 'find',
    'partition': 'rpartition',
    'rpartition': 'partition',
    'startswith': 'endswith',
    'endswith': 'startswith',
    'append': 'extend',
}
# Calls whose arguments are text for people.
MESSAGES = {'print', 'warn', 'warning', 'echo', 'UserError', 'UsageError', 'ClickException', 'BadParameter'}


@dataclass(frozen=True)
class Place:
    """A node that a fault may replace.

    Attributes:
        file, line: its position.
        function: qualified name of the innermost function or class; '' for the module.
        before, text, after: the statement, or its head, in one line, split around the text to replace.
        start, end: offsets of that text in the file.
        lines: lines of which one must be executed for the fault to matter; None for any line of the file.
        faults: (operator, replacement) of each fault.
        count: number of earlier places in this function with the same statement and text.
    """

    file: str
    line: int
    function: str
    before: str
    text: str
    after: str
    start: int
    end: int
    lines: range | None
    faults: tuple[tuple[str, str], ...]
    count: int = 0

    @property
    def key(self) -> tuple[str, ...]:
        """Identity of the place, without line numbers."""
        return self.file, self.function, self.before, self.text, self.after, str(self.count)


@dataclass(frozen=True)
class Mutant:
    """A place with a fault. `key`, eight hex digits, identifies both, also after changes elsewhere in the
    file; `change` describes them."""

    key: str
    change: str
    file: str
    line: int
    lines: range | None
    operator: str
    start: int
    end: int
    text: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]


# ----------------------------------------------------------------------------
# Faults of a node.


def called(node: ast.Call) -> str:
    """The last name of the called expression; '' if it has none."""
    function = node.func
    return (
        function.attr
        if isinstance(function, ast.Attribute)
        else function.id
        if isinstance(function, ast.Name)
        else ''
    )


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))
    )


def negated(node: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), node)


def number(value: int | float) -> ast.expr:
    return ast.UnaryOp(ast.USub(), ast.Constant(-value)) if value < 0 else ast.Constant(value)


def of_constant(node: ast.Constant) -> Iterator[tuple[str, ast.AST]]:
    value = node.value
    if isinstance(value, bool):
        yield 'boolean', ast.Constant(not value)
    elif isinstance(value, int):
        yield 'constant', ast.Constant(value + 1)
        if value:
            yield 'constant', number(value - 1)
            yield 'constant', number(-value)
    elif isinstance(value, float):
        yield 'constant', ast.Constant(1.25 * value if value else 1.0)
        if value:
            yield 'constant', number(-value)


def root(node: ast.expr) -> str:
    """The first name of a dotted name; '' for other expressions."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ''


def of_call(node: ast.Call, imported: set[str]) -> Iterator[tuple[str, ast.AST]]:
    """(operator, replacement) of each fault of a call; `imported`: names of modules."""
    # Another function of the same signature.
    name, plain = called(node), not any(isinstance(argument, ast.Starred) for argument in node.args)
    if other := NAMES.get(name):
        function = (
            ast.Attribute(node.func.value, other, ast.Load())
            if isinstance(node.func, ast.Attribute)
            else ast.Name(other, ast.Load())
        )
        yield 'other function', ast.Call(function, node.args, node.keywords)

    # Positional arguments.
    if plain and len(node.args) >= 2 and ast.dump(node.args[0]) != ast.dump(node.args[1]):
        yield (
            'arguments swapped',
            ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords),
        )
    if (
        plain
        and len(node.args) == 1
        and not node.keywords
        and name[:1].islower()
        and name not in ('range', 'iter', 'next', 'len')
    ):
        yield 'call replaced by its argument', node.args[0]

    # `x.method()` becomes `x`, unless x is a module; keyword arguments are dropped, but not those of classes and
    # `dict`, which are data.
    if isinstance(node.func, ast.Attribute) and root(node.func) not in imported:
        yield 'method left out', node.func.value
    for i, keyword in enumerate(node.keywords):
        if keyword.arg and not name[:1].isupper() and name != 'dict':
            yield (
                'keyword left out',
                ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :]),
            )


def of_expression(node: ast.AST, imported: set[str]) -> Iterator[tuple[str, ast.AST]]:
    """(operator, replacement) of each fault of an expression."""
    if isinstance(node, ast.Constant):
        yield from of_constant(node)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        for other in COMPARISONS[type(node.ops[0])]:
            yield 'comparison', ast.Compare(node.left, [other()], node.comparators)
    elif isinstance(node, ast.Compare):
        # A chain, one operator at a time.
        for i, op in enumerate(node.ops):
            yield (
                'comparison',
                ast.Compare(
                    node.left,
                    [*node.ops[:i], COMPARISONS[type(op)][0](), *node.ops[i + 1 :]],
                    node.comparators,
                ),
            )
    elif (
        isinstance(node, ast.BinOp)
        and type(node.op) in ARITHMETIC
        and not is_text(node.left)
        and not is_text(node.right)
    ):
        yield 'arithmetic', ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
        if isinstance(node.op, (ast.Sub, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)):
            yield 'operands swapped', ast.BinOp(node.right, node.op, node.left)
        if isinstance(node.op, (ast.Add, ast.Mult)):
            yield 'operand left out', node.left
    elif isinstance(node, ast.UnaryOp):
        yield 'sign or negation left out', node.operand
    elif isinstance(node, ast.BoolOp):
        yield 'and, or', ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        for i in range(len(node.values)):
            rest = node.values[:i] + node.values[i + 1 :]
            yield 'condition left out', rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
    elif isinstance(node, ast.IfExp):
        yield 'branch', node.body
        yield 'branch', node.orelse
    elif isinstance(node, ast.Call):
        yield from of_call(node, imported)
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        bounds = node.slice
        for name in ('lower', 'upper', 'step'):
            if getattr(bounds, name) is not None:
                rest = ast.Slice(
                    **{**{n: getattr(bounds, n) for n in ('lower', 'upper', 'step')}, name: None}
                )
                yield 'slice bound left out', ast.Subscript(node.value, rest, ast.Load())


def of_statement(node: ast.stmt, arguments: list[str]) -> Iterator[tuple[str, ast.AST]]:
    """(operator, replacement) of each fault of an entire statement."""
    if isinstance(node, ast.Raise):
        yield 'raise left out', ast.Pass()
    elif isinstance(node, (ast.Break, ast.Continue)):
        yield 'jump left out', ast.Pass()
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield 'statement left out', ast.Pass()
    elif isinstance(node, ast.AugAssign):
        yield 'statement left out', ast.Pass()
        if type(node.op) in ARITHMETIC and not is_text(node.value):
            yield 'arithmetic', ast.AugAssign(node.target, ARITHMETIC[type(node.op)](), node.value)
    elif isinstance(node, ast.Assign) and not all(isinstance(target, ast.Name) for target in node.targets):
        if not any(isinstance(target, ast.Tuple) for target in node.targets):
            yield 'statement left out', ast.Pass()
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        yield 'None returned', ast.Return(ast.Constant(None))
        others = [
            name for name in arguments if not (isinstance(node.value, ast.Name) and node.value.id == name)
        ]
        if others:
            yield 'argument returned', ast.Return(ast.Name(others[0], ast.Load()))


# ----------------------------------------------------------------------------
# Places of a file.


class Finder(ast.NodeVisitor):
    """Visits a syntax tree and collects places, with the function, statement and lines that contain them."""

    def __init__(self, file: str, source: bytes):
        self.file, self.source = file, source
        self.offsets = [0]
        for line in source.splitlines(keepends=True):
            self.offsets.append(self.offsets[-1] + len(line))
        self.imported: set[str] = set()
        self.scope: list[str] = []
        self.inside = False  # whether in a function
        self.arguments: list[str] = []
        self.statement: ast.stmt | None = None
        self.lines: range | None = None
        self.places: list[Place] = []
        self.seen: Counter = Counter()

    def span(self, node: ast.AST) -> tuple[int, int]:
        return (
            self.offsets[node.lineno - 1] + node.col_offset,
            self.offsets[node.end_lineno - 1] + node.end_col_offset,
        )

    def add(self, node: ast.AST, faults: Iterator[tuple[str, ast.AST]]) -> None:
        """Add a place for a node, if there are faults for it."""
        # The statement around it; of compound statements only the head.
        start, end = self.span(node)
        first, last = self.span(self.statement)
        body = getattr(self.statement, 'body', None)
        if isinstance(body, list) and body:
            last = max(self.span(body[0])[0], end)
        before, text, after = (
            ' '.join(self.source[a:b].decode().split())
            for a, b in ((first, start), (start, end), (end, last))
        )

        # Parentheses keep the precedence of a replaced expression.
        found = []
        for operator, other in faults:
            written = ast.unparse(ast.fix_missing_locations(other))
            found.append((operator, written if isinstance(node, ast.stmt) else f'({written})'))
        if found:
            key = (*self.scope, before, text, after)
            self.places.append(
                Place(
                    self.file,
                    node.lineno,
                    '.'.join(self.scope),
                    before,
                    text,
                    after,
                    start,
                    end,
                    self.lines,
                    tuple(found),
                    self.seen[key],
                )
            )
            self.seen[key] += 1

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt):
            self.visit_statement(node)
        elif isinstance(node, ast.expr):
            self.visit_expression(node)
        else:
            self.generic_visit(node)

    def visit_expression(self, node: ast.expr) -> None:
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Call) and called(node) in MESSAGES):
            return
        if isinstance(getattr(node, 'ctx', None), (ast.Store, ast.Del)):
            return
        self.add(node, of_expression(node, self.imported))
        if isinstance(node, ast.Subscript):
            self.visit(node.value)
            self.visit(node.slice)
            return
        self.generic_visit(node)

    def visit_statement(self, node: ast.stmt) -> None:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            self.imported |= {(name.asname or name.name).partition('.')[0] for name in node.names}
            return
        if isinstance(node, (ast.Global, ast.Nonlocal)) or self.is_left_out(node):
            return
        outer = self.statement, self.lines
        self.statement = node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self.visit_function(node)
        elif isinstance(node, ast.ClassDef):
            self.visit_class(node)
        else:
            self.visit_plain(node)
        self.statement, self.lines = outer

    def visit_plain(self, node: ast.stmt) -> None:
        # In a function, the lines of the statement or its head; elsewhere those of the enclosing node.
        body = getattr(node, 'body', None)
        if self.inside:
            last = (
                body[0].lineno - 1
                if isinstance(body, list) and body and body[0].lineno > node.lineno
                else node.end_lineno
            )
            self.lines = range(node.lineno, max(last, node.lineno) + 1)
        self.add(node, of_statement(node, self.arguments))

        # Conditions, then what the statement contains; texts of errors are excluded.
        if isinstance(node, (ast.If, ast.While)):
            self.add(
                node.test,
                (
                    (name, test)
                    for name, test in (
                        ('always', ast.Constant(True)),
                        ('never', ast.Constant(False)),
                        ('condition negated', negated(node.test)),
                    )
                ),
            )
        if isinstance(node, ast.Raise):
            return
        for name, value in ast.iter_fields(node):
            if name == 'annotation':
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self.visit(child)

    def visit_function(self, node) -> None:
        # Defaults and decorators run at import, but only matter if the function runs.
        defaults = [value for value in [*node.args.defaults, *node.args.kw_defaults] if value is not None]
        self.scope.append(node.name)
        self.lines = range(node.body[0].lineno, node.end_lineno + 1)
        for value in defaults:
            self.visit(value)
        for decorator in node.decorator_list:
            self.visit(decorator)
        outer = self.inside, self.arguments
        self.inside, self.arguments = (
            True,
            [a.arg for a in [*node.args.posonlyargs, *node.args.args] if a.arg not in ('self', 'cls')],
        )
        for child in without_docstring(node.body):
            self.visit(child)
        self.inside, self.arguments = outer
        self.scope.pop()

    def visit_class(self, node: ast.ClassDef) -> None:
        self.scope.append(node.name)
        outer, self.inside = self.inside, False
        self.lines = range(node.lineno, node.end_lineno + 1)
        for child in without_docstring(node.body):
            self.visit(child)
        self.inside = outer
        self.scope.pop()

    def is_left_out(self, node: ast.stmt) -> bool:
        if isinstance(node, ast.Expr):
            return isinstance(node.value, ast.Constant) or (
                isinstance(node.value, ast.Call) and called(node.value) in MESSAGES
            )
        if isinstance(node, ast.Assign):
            return any(isinstance(target, ast.Name) and target.id == '__all__' for target in node.targets)
        test = ast.unparse(node.test) if isinstance(node, ast.If) else ''
        return test.endswith('TYPE_CHECKING') or test.startswith('__name__ ==')


def without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    return (
        body[1:]
        if isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
        else body
    )


def places_of(file: str, source: bytes) -> list[Place]:
    """The places of a file, in their order."""
    finder = Finder(file, source)
    for node in without_docstring(ast.parse(source).body):
        finder.visit(node)
    return finder.places


def rank(seed: int, *names: str) -> bytes:
    """Sort key of a random order by a seed; adding other things does not change the order of two."""
    return hashlib.sha256('\0'.join([str(seed), *names]).encode()).digest()


def mutants_of(file: str, source: bytes, seed: int) -> list[Mutant]:
    """A mutant for each place of a file, in the order in which they are drawn."""
    found = []
    for place in places_of(file, source):
        operator, text = min(place.faults, key=lambda fault: rank(seed, *place.key, *fault))
        where, what = (place.before[-40:], place.after[:40]), ' '.join(text.split())
        written = (' '.join([where[0], f'[{part}]', where[1]]).strip() for part in (place.text, what))
        mutant = Mutant(
            rank(0, *place.key, operator, text).hex()[:8],
            f'{place.function or "module"}: {" -> ".join(written)}',
            file,
            place.line,
            place.lines,
            operator,
            place.start,
            place.end,
            text,
        )
        found.append((rank(seed, *place.key), mutant))
    return [mutant for _, mutant in sorted(found, key=lambda pair: pair[0])]


def compiles(source: bytes) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SyntaxWarning)
        try:
            compile(source, 'mutant', 'exec')
        except (SyntaxError, ValueError):
            return False
    return True


def draw(sources: dict[str, bytes], num: int, seed: int, left_out: Collection[str]) -> list[Mutant]:
    """Draw `num` mutants: in proportion to the places of each file (largest remainders), and at least one per
    file.

    Args:
        left_out: keys of mutants to exclude, instead of which others are drawn.
    """
    # Numbers per file.
    ready = {file: mutants for file, source in sources.items() if (mutants := mutants_of(file, source, seed))}
    total = sum(map(len, ready.values()))
    share = {file: max(num * len(mutants) / total, 1) for file, mutants in ready.items()}
    counts = {file: int(value) for file, value in share.items()}
    by_remainder = sorted(ready, key=lambda file: (counts[file] - share[file], file))
    for file in by_remainder[: max(num - sum(counts.values()), 0)]:
        counts[file] += 1

    # The first of each file that compile and are not excluded.
    chosen = []
    for file, mutants in ready.items():
        fit = (m for m in mutants if m.key not in left_out and compiles(m.apply(sources[file])))
        chosen += itertools.islice(fit, counts[file])
    return sorted(chosen, key=lambda mutant: rank(seed, mutant.key))
