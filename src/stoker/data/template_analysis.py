"""What a chat template does with contents, read from its syntax tree.

A template that only prints contents, trimmed or not, renders marked contents as it renders them bare. Everything here
is conservative: what is not known to be harmless counts as harmful, and costs a second render of each row.
"""

from jinja2 import nodes

_SAFE_TESTS = {"defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "boolean"}
_SAFE_FUNCTIONS = {"raise_exception", "namespace", "strftime_now", "range"}
_CALL_KEYS = {"tool_calls", "function", "arguments", "name", "id", "tool_call_id"}


def only_prints_contents(tree: nodes.Template) -> bool:
    """Whether a template does nothing with contents but print them, trimmed or not, and ask whether they are there.

    A comparison, a method, an unusual filter or a slice of something that may hold a content makes the answer no.
    """
    return _Analysis(tree).only_prints_contents()


def escapes_contents(tree: nodes.Template) -> bool:
    """Whether a template may print a content as JSON, which writes its white space in another way."""
    known = _Analysis(tree)
    return any(node.name == "tojson" and not known.is_tool_part(node.node) for node in tree.find_all(nodes.Filter))


class _Analysis:
    """The names that a template binds, and what can be said of its expressions from them."""

    def __init__(self, tree: nodes.Template) -> None:
        self._tree = tree
        self._sources = _bound(tree)
        self._tool_names = {"tools"}
        while found := {name for name in self._sources if all(map(self.is_tool_part, self._sources[name]))}:
            if found <= self._tool_names:  # a name may be bound to another that is known only later
                break
            self._tool_names |= found
        # A counter may be bound to itself plus one: all are taken for counters until a source of one is something else.
        self._counters = set(self._sources)
        while wrong := {name for name in self._counters if not all(map(self._is_counter, self._sources[name]))}:
            self._counters -= wrong

    def only_prints_contents(self) -> bool:
        """Answers for the whole template."""
        tree = self._tree
        return (
            all(self._is_safe_filter(node) for node in tree.find_all(nodes.Filter))
            and all(node.name in _SAFE_TESTS for node in tree.find_all(nodes.Test))
            and all(_is_safe_call(node) for node in tree.find_all(nodes.Call))
            and all(self._is_safe_comparison(node) for node in tree.find_all(nodes.Compare))
            and all(self._is_safe_item(node) for node in tree.find_all(nodes.Getitem))
            and all(self._is_safe_loop(node.iter) for node in tree.find_all(nodes.For))
        )

    def is_tool_part(self, node: nodes.Node | None) -> bool:
        """Whether an expression holds tools, or calls of them, or a part of these, and so no content."""
        match node:
            case nodes.Name():
                return node.name in self._tool_names
            case nodes.Getattr():
                return node.attr in _CALL_KEYS or self.is_tool_part(node.node)
            case nodes.Getitem(arg=nodes.Const(value=str() as key)):
                return key in _CALL_KEYS or self.is_tool_part(node.node)
            case nodes.Getitem():
                return self.is_tool_part(node.node)
            case nodes.Or():
                return self.is_tool_part(node.left) and (self.is_tool_part(node.right) or _is_empty(node.right))
        return False

    def _is_counter(self, node: nodes.Node) -> bool:
        """Whether a value is made of constants, counts and roles."""
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name == "namespace":
            return not node.args and all(self._is_structural(pair.value) for pair in node.kwargs)
        return self._is_structural(node)

    def _is_safe_filter(self, node: nodes.Filter) -> bool:
        if node.name == "length":
            return self._is_list(node.node)
        return node.name in ("trim", "tojson") and not node.args

    def _is_list(self, node: nodes.Node | None) -> bool:
        return self.is_tool_part(node) or (node is not None and self._is_message_list(node))

    def _is_safe_loop(self, node: nodes.Node) -> bool:
        return self._is_list(node) or isinstance(node, nodes.Call)

    def _is_safe_comparison(self, node: nodes.Compare) -> bool:
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        # No text equals true, false or none, marked or not.
        if any(isinstance(side, nodes.Const) and not isinstance(side.value, str | int | float) for side in sides):
            return True
        if any(isinstance(side, nodes.Const) and isinstance(side.value, bool) for side in sides):
            return True
        return all(self._is_structural(side) for side in sides)

    def _is_structural(self, node: nodes.Node) -> bool:  # noqa: PLR0911 - one answer a kind of node
        """Whether an expression cannot hold a content: constants, loop counters, roles, and arithmetic on them."""
        match node:
            case nodes.Const():
                return True
            case nodes.Name():
                return node.name in self._counters
            case nodes.Getattr():
                names = {"loop", *self._counters}
                return node.attr == "role" or (isinstance(node.node, nodes.Name) and node.node.name in names)
            case nodes.Getitem():
                return isinstance(node.arg, nodes.Const) and node.arg.value == "role"
            case nodes.Filter():
                return node.name == "length" and self._is_list(node.node)
            case nodes.Compare():
                return self._is_safe_comparison(node)
            case nodes.BinExpr() | nodes.UnaryExpr() | nodes.List() | nodes.Tuple():
                return all(self._is_structural(child) for child in node.iter_child_nodes())
        return False

    def _is_safe_item(self, node: nodes.Getitem) -> bool:
        """Whether `x[...]` reads a named field, an element or slice of the list of messages, or a part of tools."""
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return True
        return self._is_list(node.node)

    def _is_message_list(self, node: nodes.Node) -> bool:
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            return self._is_message_list(node.node)
        return isinstance(node, nodes.Name) and node.name in {"messages", "loop_messages"}


def _bound(tree: nodes.Template) -> dict[str, list[nodes.Node]]:
    """Returns what each name is bound to, in assignments, in fields of namespaces and in loops."""
    found: dict[str, list[nodes.Node]] = {}
    for node in tree.find_all(nodes.Assign):
        if isinstance(node.target, nodes.Name | nodes.NSRef):
            found.setdefault(node.target.name, []).append(node.node)
        else:
            for name in node.target.find_all(nodes.Name):
                found.setdefault(name.name, []).append(node)
    for node in tree.find_all(nodes.For):
        for name in [node.target] if isinstance(node.target, nodes.Name) else node.target.find_all(nodes.Name):
            found.setdefault(name.name, []).append(node.iter)
    for node in tree.find_all((nodes.AssignBlock, nodes.Macro)):
        for name in node.find_all(nodes.Name):
            if name.ctx in ("store", "param"):
                found.setdefault(name.name, []).append(node)
    return found


def _is_empty(node: nodes.Node) -> bool:
    return isinstance(node, nodes.List) and not node.items


def _is_safe_call(node: nodes.Call) -> bool:
    target = node.node
    if isinstance(target, nodes.Name):
        return target.name in _SAFE_FUNCTIONS
    if isinstance(target, nodes.ExtensionAttribute):
        return True
    return isinstance(target, nodes.Getattr) and target.attr in {"strip", "lstrip", "rstrip"} and not node.args
