"""Roles and tasks of prompts, from columns of the data, for advantages that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.algorithms.policy_gradient.role_estimators import HierarchicalAdvantage, OfRoles
from jaxrl_llm.checks import nearest_name
from jaxrl_llm.data.prompts import PromptDataset


def check_roles(advantage: OfRoles, dataset: PromptDataset) -> None:
    """Checks, before anything is sampled, that each row names a role that there is.

    Raises:
        ValueError: a column is missing, or a row holds no role; names it.
    """
    columns = {"role_column": advantage.role_column}
    if isinstance(advantage, HierarchicalAdvantage):
        columns["task_column"] = advantage.task_column
    for setting, column in columns.items():
        if column not in dataset.column_names:
            raise ValueError(
                f"algorithm.advantage.{setting}={column!r} is no column of the data"
                f"{nearest_name(column, dataset.column_names)}; they are {sorted(dataset.column_names)}"
            )
    for item in range(len(dataset)):
        number, values = dataset.columns_of(item)
        if (role := str(values[advantage.role_column])) not in advantage.roles:
            raise ValueError(
                f"row {number}: the column {advantage.role_column!r} holds {role!r}, and the roles are "
                f"{', '.join(advantage.roles)}: mend the row, or pass --algorithm.advantage.roles"
            )


def role_feedback(advantage: OfRoles, columns: Mapping[str, Sequence[Any]]) -> dict[str, np.ndarray]:
    """`roles` and `tasks` of `Feedback`, `[P]` each, of prompts with these columns."""
    numbers = {name: number for number, name in enumerate(advantage.roles)}
    feedback = {"roles": np.array([numbers[str(value)] for value in columns[advantage.role_column]], np.int32)}
    if isinstance(advantage, HierarchicalAdvantage):
        tasks = [str(value) for value in columns[advantage.task_column]]
        feedback["tasks"] = np.unique(tasks, return_inverse=True)[1].astype(np.int32)
    return feedback
