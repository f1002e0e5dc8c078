"""YAML that a user wrote: a duplicate key, of which all but the last value would be lost, is refused."""

from typing import Any

import yaml


class DuplicateKey(yaml.YAMLError):
    """A key appears twice in one mapping, which YAML forbids and PyYAML lets pass."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Look at the keys as they are written: what a merge key (``<<``) brings in may stand there again."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, Any], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and name in lines:
                first = lines[name]
                places = f"twice in line {line}" if first == line else f"in line {first} and again in line {line}"
                raise DuplicateKey(f"the key {key.value!r} stands {places}, where the last would count: keep one")
            lines[name] = line
        return node


# A date stays text, as it was typed: jsonargparse reads it as any other value, and it is written as such again.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str) -> Any:
    """Give what a YAML text holds.

    Raises:
        yaml.YAMLError: It is not YAML, or a key stands twice in it.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
