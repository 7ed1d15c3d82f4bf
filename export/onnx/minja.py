"""What minja, the engine of chat templates in genai 0.18, renders otherwise than jinja2.

Read in its minja.hpp and run beside transformers. Listed is what was found to be the same; all
else counts as different.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_NODES = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.Getattr),
    *(nodes.Getitem, nodes.Slice, nodes.Filter, nodes.Test, nodes.Call, nodes.Keyword),
    *(nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.If, nodes.For),
    *(nodes.Assign, nodes.NSRef, nodes.CondExpr, nodes.Concat, nodes.Add, nodes.Sub, nodes.Mul),
    *(nodes.Mod, nodes.Neg, nodes.List, nodes.Tuple, nodes.Break, nodes.Continue, nodes.Scope),
)
# (operators, what minja joins to them otherwise if no parentheses stand around it)
_OTHER_ORDER: tuple[tuple[tuple[type[nodes.Node], ...], tuple[type[nodes.Node], ...]], ...] = (
    ((nodes.Add, nodes.Sub, nodes.Mul, nodes.Mod, nodes.Compare), (nodes.Concat, nodes.Test)),
    ((nodes.Operand,), (nodes.Concat, nodes.Test)),
    ((nodes.And,), (nodes.Concat,)),
    ((nodes.Concat,), (nodes.Test,)),
    ((nodes.Mul, nodes.Mod), (nodes.Filter,)),
)
_FILTERS = {  # how many arguments they may have
    **{"trim": 0, "length": 0, "count": 0, "list": 0, "items": 0, "last": 0, "tojson": 0},
    **{"join": 1, "default": 2, "map": 0, "selectattr": 3, "rejectattr": 3},
}
_FILTER_KEYWORDS = {"tojson": {"indent"}, "map": {"attribute"}}
_METHODS = {  # how many arguments they have, at least and at most
    **dict.fromkeys(("strip", "lstrip", "rstrip"), (0, 1)),
    **dict.fromkeys(("startswith", "endswith", "split"), (1, 1)),
    **{"get": (1, 2), "items": (0, 0)},
}
_FUNCTIONS = ("namespace", "raise_exception", "strftime_now", "range")
_TESTS = ("string", "mapping", "defined")  # and two with conditions
_LOOP = "index index0 revindex revindex0 length first last previtem nextitem".split()
_MISSING = ("pad_token", "unk_token", "eot_token", "eom_token")  # genai gives bos and eos alone
_FUNCTIONS_THERE = frozenset(  # and mere undefined names in jinja2
    """tojson items last trim lower default e escape joiner count dictsort join equalto length safe
    string int list unique select reject map indent selectattr rejectattr""".split()
)
_METHODS_OF_TABLES = frozenset(name for name in dir(dict) if not name.startswith("_"))
_NEVER_TEXT = ("tools", "documents")  # given, or none


class _Generation(Extension):
    """transformers' own block, whose content is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def parse(source: str, *, trim: bool) -> nodes.Template:
    """The syntax tree; `trim`: with trim_blocks and lstrip_blocks, as transformers has it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=trim, lstrip_blocks=trim, extensions=[_Generation, loopcontrols]
    )
    return environment.parse(source)


def differences(tree: nodes.Template) -> Iterator[str]:
    """What is different, or may be: "it has ... in line 3"."""
    template = _Template(tree)
    checks: Sequence[Callable[[nodes.Node], str | None]] = (
        *(_unknown, _order, _number, _filter, _call, _block, _comparison),
        *(template.name, template.length, template.part, template.membership),
        *(template.test, template.attribute, template.conjunction),
    )
    for node in tree.find_all(nodes.Node):
        for check in checks:
            if what := check(node):
                yield f"it has {what} in line {node.lineno}"
    yield from _leaks(tree, {name for loop in tree.find_all(nodes.For) for name in _targets(loop)})
    for loop in tree.find_all(nodes.For):
        yield from _stale(loop)


def trims(tree: nodes.Template) -> bool:
    """Whether white space is stripped from texts: minja takes but blank, tab, LF and CR for it."""
    calls = (call.node for call in tree.find_all(nodes.Call) if not call.args)
    methods = {one.attr for one in calls if isinstance(one, nodes.Getattr)}
    filters = {one.name for one in tree.find_all(nodes.Filter)}
    return "trim" in filters or bool(methods & {"strip", "lstrip", "rstrip"})


def _unknown(node: nodes.Node) -> str | None:
    return None if isinstance(node, _NODES) else f"a {type(node).__name__}"


def _order(node: nodes.Node) -> str | None:
    for parents, children in _OTHER_ORDER:
        if isinstance(node, parents):
            if any(isinstance(child, children) for child in node.iter_child_nodes()):
                return "operators that are taken in another order"
    return None


def _number(node: nodes.Node) -> str | None:
    match node:
        case nodes.Const(value=float()):
            return "a number with a fraction"
        case nodes.Neg() if not isinstance(node.node, nodes.Const):
            return "a minus"
        case nodes.Mod(left=left, right=right):
            whole = isinstance(right, nodes.Const) and isinstance(right.value, int)
            return None if whole and not isinstance(left, nodes.Const) else "a %"
    return None


def _filter(node: nodes.Node) -> str | None:
    if not isinstance(node, nodes.Filter):
        return None
    keywords = {pair.key for pair in node.kwargs}
    few = len(node.args) <= _FILTERS.get(node.name, -1)
    if not few or not keywords <= _FILTER_KEYWORDS.get(node.name, set()) or _starred(node):
        return f"the filter {node.name}"
    if node.name == "map" and not keywords:
        return "the filter map without an attribute"
    if node.name.endswith("attr"):  # without a test minja gives the attributes
        match node.args:
            case [_, nodes.Const(value="equalto" | "=="), _]:
                return None
        return f"the filter {node.name} without equalto"
    return None


def _call(node: nodes.Node) -> str | None:
    if not isinstance(node, nodes.Call):
        return None
    match node.node:
        case nodes.Name(name=name) if name in _FUNCTIONS and not _starred(node):
            return None
        case nodes.Getattr(attr=name) if name in _METHODS:
            least, most = _METHODS[name]
            known = all(map(_is_ascii, node.args)) or "strip" not in name  # it strips bytes
            if least <= len(node.args) <= most and not node.kwargs and known:
                return f"a call of {name}(*...)" if _starred(node) else None
            return f"{name} with such arguments"
        case nodes.Name(name=name) | nodes.Getattr(attr=name):
            return f"a call of {name}"
    return "a call"


def _block(node: nodes.Node) -> str | None:
    match node:
        case nodes.For(recursive=True):
            return "a recursive loop"
        case nodes.Scope() if any(node.find_all(nodes.Assign)):
            return "a variable that is set in a generation block"
        case nodes.List(items=items) | nodes.Tuple(items=items, ctx="load"):
            return None if all(map(_is_filled, items)) else "a list of other things than texts"
    return None


def _comparison(node: nodes.Node) -> str | None:
    if not isinstance(node, nodes.Compare):
        return None
    if len(node.ops) > 1:
        return "a chain of comparisons"
    for one in (node.expr, node.ops[0].expr):
        if isinstance(one, nodes.Const) and one.value is None:
            return "a comparison with none"  # what is not defined equals it there
    return None


@dataclass(frozen=True, slots=True)
class _Binding:
    """What a name is set to: `value`, or each member of it; None is anything."""

    value: nodes.Node | None
    each: bool


class _Template:
    """What the names of a template stand for, and what stands around its parts."""

    def __init__(self, tree: nodes.Template) -> None:
        self.bindings: dict[str, list[_Binding]] = {}
        for loop in tree.find_all(nodes.For):
            self._bind(loop, loop.iter, each=True)
        for assignment in tree.find_all(nodes.Assign):
            self._bind(assignment, assignment.node, each=False)
        # Names that always stand for a list of messages: all, less those that some value rules out.
        self.lists = {"messages", *self.bindings}
        while wrong := {name for name in self.lists if not self._stays_list(name)}:
            self.lists -= wrong
        self.called = {id(call.node) for call in tree.find_all(nodes.Call)}
        keyed = [one for one in tree.find_all(nodes.Expr) if _key(one) is not None]
        self.keyed = {
            id(next(one.iter_child_nodes())) for one in keyed if id(one) not in self.called
        }
        self.conditions = set(map(id, _conditions(tree)))
        self.guarded = set(map(id, _guarded(tree)))

    def _bind(self, node: nodes.Assign | nodes.For, value: nodes.Node, *, each: bool) -> None:
        one = value if isinstance(node.target, nodes.Name) else None
        for name in _targets(node):
            self.bindings.setdefault(name, []).append(_Binding(one, each))

    def _stays_list(self, name: str) -> bool:
        bindings = self.bindings.get(name, [])
        return all(not one.each and self._are_messages(one.value) for one in bindings)

    def _are_messages(self, value: nodes.Node | None) -> bool:
        match value:
            case nodes.Name(name=name):
                return name in self.lists
            case nodes.Getitem(node=inner, arg=nodes.Slice()):
                return self._are_messages(inner)
            case nodes.Filter(node=inner, name="list" | "selectattr" | "rejectattr"):
                return self._are_messages(inner)
        return False

    def _is_message(self, value: nodes.Node | None) -> bool:
        match value:
            case nodes.Name(name=name):
                bindings = self.bindings.get(name, [])
                return bool(bindings) and all(map(self._binds_message, bindings))
            case nodes.Getitem(node=inner, arg=arg) if not isinstance(arg, nodes.Slice):
                return self._are_messages(inner)
        return False

    def _binds_message(self, one: _Binding) -> bool:
        if one.each:
            return self._are_messages(one.value)
        return not isinstance(one.value, nodes.Name) and self._is_message(one.value)

    def _is_list(self, value: nodes.Node | None) -> bool:
        match value:
            case nodes.Filter(name="list" | "selectattr" | "rejectattr" | "map" | "items"):
                return True
            case nodes.Call(node=nodes.Getattr(attr="split" | "items")):
                return True
            case nodes.Name(name=name) if name in _NEVER_TEXT and name not in self.bindings:
                return True
        return self._are_messages(value) or (value is not None and _key(value) == "tool_calls")

    def name(self, node: nodes.Node) -> str | None:
        if not isinstance(node, nodes.Name) or node.ctx != "load" or node.name in self.bindings:
            return None
        if node.name in _MISSING:
            return f"the variable {node.name}, empty there,"
        return f"the variable {node.name}" if node.name in _FUNCTIONS_THERE else None

    def length(self, node: nodes.Node) -> str | None:
        match node:
            case nodes.Filter(name="length" | "count", node=inner) if not self._is_list(inner):
                return "the length of what may be a text"  # counted in bytes
        return None

    def part(self, node: nodes.Node) -> str | None:
        """Parts of texts are empty, or cut within a letter; what has keys is no part of a text."""
        if not isinstance(node, nodes.Getitem) or _key(node) is not None:
            return None
        known = self._is_list(node.node) or id(node) in self.keyed
        return None if known else "a part of what may be a text"

    def membership(self, node: nodes.Node) -> str | None:
        """In a text: never. In a table: right for `in`, wrong for `not in`."""
        if not isinstance(node, nodes.Compare) or node.ops[0].op not in ("in", "notin"):
            return None
        where = node.ops[0].expr
        if isinstance(where, nodes.List | nodes.Tuple):
            return None
        if node.ops[0].op == "in" and self._is_message(where) and _is_filled(node.expr):
            return None
        word = "in" if node.ops[0].op == "in" else "not in"
        return f"`{word}` of what may be a text"

    def test(self, node: nodes.Node) -> str | None:
        """What is not defined is none there, and is not iterable."""
        match node:
            case nodes.Test(args=[_, *_]) | nodes.Test(kwargs=[_, *_]):
                return f"the test {node.name}"
            case nodes.Test(name="none", node=inner):
                known = isinstance(inner, nodes.Name) and (
                    inner.name in self.bindings or inner.name in _NEVER_TEXT
                )
                return None if known or id(node) in self.guarded else "an unguarded test for none"
            case nodes.Test(name="iterable", node=inner):
                return None if _key(inner) == "content" else "the test iterable"
            case nodes.Test(name=name) if name not in _TESTS:
                return f"the test {name}"
        return None

    def attribute(self, node: nodes.Node) -> str | None:
        if not isinstance(node, nodes.Getattr) or id(node) in self.called:
            return None
        if isinstance(node.node, nodes.Name) and node.node.name == "loop":
            return None if node.attr in _LOOP else f"loop.{node.attr}"
        return f"the attribute {node.attr}" if node.attr in _METHODS_OF_TABLES else None

    def conjunction(self, node: nodes.Node) -> str | None:
        if not isinstance(node, nodes.And) or id(node) in self.conditions or _is_boolean(node):
            return None
        return "an `and` whose value is taken"  # true or false there, never an operand


def _conditions(tree: nodes.Node) -> Iterator[nodes.Node]:
    """Every part of a condition that only counts as true or false."""
    roots: list[nodes.Node | None] = [one.node for one in tree.find_all(nodes.Not)]
    roots += [one.test for one in tree.find_all(nodes.If)]
    roots += [one.test for one in tree.find_all(nodes.CondExpr)]
    roots += [one.test for one in tree.find_all(nodes.For)]
    while roots:
        part = roots.pop()
        if isinstance(part, nodes.And | nodes.Or):
            roots += part.left, part.right
        if part is not None:
            yield part


def _guarded(tree: nodes.Node) -> Iterator[nodes.Node]:
    """Tests for none in `x is defined and x is not none`, `"x" in y and y.x is not none`."""
    for both in tree.find_all(nodes.And):
        left = both.left.right if isinstance(both.left, nodes.And) else both.left
        right = both.right.node if isinstance(both.right, nodes.Not) else both.right
        if not isinstance(right, nodes.Test):
            continue
        match left:
            case nodes.Test(name="defined", node=known) if known == right.node:
                yield right
            case nodes.Compare(
                expr=nodes.Const(value=key), ops=[nodes.Operand(op="in", expr=known)]
            ) if key == _key(right.node) and known == next(right.node.iter_child_nodes()):
                yield right


def _leaks(node: nodes.Node, names: set[str], bound: frozenset[str] = frozenset()) -> Iterator[str]:
    """Variables of loops keep their last value there, outside of the loop too."""
    if isinstance(node, nodes.Name) and node.ctx == "load" and node.name in names - bound:
        yield f"it has {node.name} in line {node.lineno}, outside of the loop over it"
    inner = bound
    if isinstance(node, nodes.For):
        inner = bound | _targets(node)
        yield from _leaks(node.iter, names, bound)
        if again := bound & _targets(node):
            yield f"it has loops over {min(again)} in one another in line {node.lineno}"
    for child in node.iter_child_nodes(exclude=("iter",)):
        yield from _leaks(child, names, inner)


def _stale(loop: nodes.For) -> Iterator[str]:
    """What an iteration sets is still set in the next one there: reads that would see it."""
    names = _set_in(loop.body)
    read: set[str] = set()
    _after(loop.body, names, _targets(loop), read)
    for name in sorted(read):
        yield f"it has {name} read before it is set in the loop of line {loop.lineno}"


def _set_in(body: Sequence[nodes.Node]) -> frozenset[str]:
    """Names set by these statements, loops within them left out."""
    found: frozenset[str] = frozenset()
    for node in body:
        if isinstance(node, nodes.Assign):
            found |= _targets(node)
        elif not isinstance(node, nodes.For):
            found |= _set_in(list(node.iter_child_nodes()))
    return found


def _after(
    body: Sequence[nodes.Node], names: frozenset[str], given: frozenset[str], read: set[str]
) -> frozenset[str] | None:
    """The names that are set after some statements, None if nothing comes after them.

    `read` gets those of `names` that are read before they are set.
    """
    for node in body:
        if isinstance(node, nodes.If):
            branches = [
                _after(one.body, names, given, _reads(one.test, names, given, read))
                for one in (node, *node.elif_)
            ]
            branches.append(_after(node.else_, names, given, read))
            going = [branch for branch in branches if branch is not None]
            if not going:
                return None
            given = frozenset.intersection(*going)
        elif isinstance(node, nodes.Assign):
            _reads(node.node, names, given, read)
            given |= _targets(node)
        elif isinstance(node, nodes.Break | nodes.Continue) or _raises(node):
            return None
        else:
            _reads(node, names, given, read)
    return given


def _reads(
    node: nodes.Node, names: frozenset[str], given: frozenset[str], read: set[str]
) -> set[str]:
    found = [node] if isinstance(node, nodes.Name) else node.find_all(nodes.Name)
    read |= {one.name for one in found if one.ctx == "load"} & (names - given)
    return read


def _raises(node: nodes.Node) -> bool:
    called = [call.node for call in node.find_all(nodes.Call)] if _is_output(node) else []
    return any(isinstance(one, nodes.Name) and one.name == "raise_exception" for one in called)


def _is_output(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Output) and not any(node.find_all(nodes.CondExpr))


def _targets(node: nodes.Assign | nodes.For) -> frozenset[str]:
    """The names that are set; none for an attribute of a namespace."""
    target = node.target
    found = [target] if isinstance(target, nodes.Name) else target.find_all(nodes.Name)
    return frozenset(name.name for name in found)


def _key(node: nodes.Node) -> str | None:
    """`x` in `of.x` and `of["x"]`."""
    match node:
        case nodes.Getattr(attr=str(name)) | nodes.Getitem(arg=nodes.Const(value=str(name))):
            return name
    return None


def _starred(node: nodes.Filter | nodes.Call) -> bool:
    return node.dyn_args is not None or node.dyn_kwargs is not None


def _is_ascii(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) and isinstance(node.value, str) and node.value.isascii()


def _is_filled(node: nodes.Node) -> bool:
    """A text, and not the empty one, which no list is found to hold there."""
    return isinstance(node, nodes.Const) and isinstance(node.value, str) and node.value != ""


def _is_boolean(node: nodes.Node) -> bool:
    if isinstance(node, nodes.And | nodes.Or):
        return _is_boolean(node.left) and _is_boolean(node.right)
    known = isinstance(node, nodes.Const) and isinstance(node.value, bool)
    return known or isinstance(node, nodes.Compare | nodes.Test | nodes.Not)
