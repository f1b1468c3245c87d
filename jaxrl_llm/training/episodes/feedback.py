"""What an algorithm is told of a step's completions: rewards, and what else it reads, made on the host."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxrl_llm.algorithms.interfaces import Algorithm, Feedback
from jaxrl_llm.algorithms.iteration import DeviceReward
from jaxrl_llm.algorithms.policy_gradient.role_estimators import OfRoles
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.training.episodes.episodes import Episodes
from jaxrl_llm.training.episodes.hints import Hints, check_hints, self_teacher_of
from jaxrl_llm.training.episodes.judging import Judge, check_judge, compare
from jaxrl_llm.training.episodes.role_columns import check_roles, role_feedback
from jaxrl_llm.training.episodes.scorable import check_scorable
from jaxrl_llm.training.episodes.scoring import RewardSum


@dataclasses.dataclass(frozen=True, eq=False)
class FeedbackSource:
    """What is asked of a step's completions, and what of it an algorithm reads."""

    algorithm: Algorithm
    rewards: RewardSum | None
    """Functions on the host."""
    device_rewards: tuple[DeviceReward, ...]
    """Functions on the device."""
    judge: Judge | None
    tokenizer: Any

    def check(self, dataset: PromptDataset, *, dynamic_sampling: int) -> None:
        """Checks that what is asked, what the algorithm reads and the data fit together.

        Raises:
            ValueError: they do not; says what.
        """
        needs, name = self.algorithm.needs, self.algorithm.reader
        rewarded = self.rewards is not None or bool(self.device_rewards)
        if not rewarded and not (self.algorithm.needs_teachers or self.algorithm.needs_hints):
            raise ValueError("there is no reward: pass rewards=, or device_rewards=")
        if rewarded and not any(weights := self.weights.tolist()):
            setting = "the weights of device_rewards, " if self.rewards is None else "reward_weights="
            raise ValueError(f"{setting}{tuple(weights)} are all 0, and nothing would be learned: give others")
        if ("verdicts" in needs) != (self.judge is not None):
            raise ValueError(
                f"{name} reads a judge's verdicts: pass judge=, as experiments/compare_algorithms.py does"
                if self.judge is None
                else f"{name} reads no verdicts"
            )
        if self.judge is not None:
            check_judge(self.judge)
        if (itself := self_teacher_of(self.algorithm)) is not None:
            check_hints(itself, dataset, self.tokenizer, rewarded=rewarded)
        if self.rewards is None:
            self._check_on_device(dynamic_sampling)
            return
        check_scorable(self.rewards, dataset)
        if (advantage := self._of_roles) is not None:
            check_roles(advantage, dataset)

    def _check_on_device(self, dynamic_sampling: int) -> None:
        needs, name = self.algorithm.needs, self.algorithm.reader
        if needs & {"verdicts", "by_function", "reference_rewards"}:
            raise ValueError(f"{name} reads what reward functions say: pass rewards=")
        if needs & {"roles", "tasks"}:
            raise ValueError(f"{name} reads columns of the data on the host: pass rewards=")
        if dynamic_sampling:
            raise ValueError(
                f"training.dynamic_sampling={dynamic_sampling} looks at rewards on the host: pass rewards=, or 0"
            )

    def __call__(self, episodes: Episodes, key: np.ndarray, step: int) -> Any:
        """Rewards, or `Feedback` with what else the algorithm reads; `key` and `step` are those of a judge's draws."""
        rewards = episodes.rewards if episodes.token_rewards is None else episodes.token_rewards
        if (itself := self_teacher_of(self.algorithm)) is not None:
            rewarded = self.rewards is not None or bool(self.device_rewards)
            known = {"scored": ~np.isnan(episodes.rewards)} if self.skips_unscored else {}
            rewards = np.nan_to_num(rewards) if rewarded else None
            return Feedback(rewards, hinted=Hints(itself, self.tokenizer)(episodes), **known)
        if "by_function" in self.algorithm.needs:
            table = np.stack(list(episodes.by_name.values()), axis=-1)
            return Feedback(rewards, by_function=table, weights=self.weights)
        if self.judge is not None:
            assert self.rewards is not None  # an algorithm that reads verdicts has them
            timeout = self.rewards.timeout
            return Feedback(rewards, **compare(self.judge, episodes, self.tokenizer, key, step, timeout=timeout))
        if (advantage := self._of_roles) is not None:
            return Feedback(rewards, **role_feedback(advantage, episodes.columns))
        if episodes.reference_rewards is not None:
            return Feedback(rewards, reference_rewards=episodes.reference_rewards)
        if self.skips_unscored and episodes.token_rewards is None:
            return Feedback(np.nan_to_num(rewards), scored=~np.isnan(rewards))
        return rewards

    @property
    def skips_unscored(self) -> bool:
        """Whether samples to which no reward function applies are left out."""
        return self.algorithm.skips_unscored and self.rewards is not None

    def foretold(self, prompts: int, group: int) -> Any:
        """Shapes and types of what a call gives, or `None` where that is known only then.

        Functions that reward tokens one by one are not known before they have been called.
        """
        more = {"by_function", "reference_rewards", "verdicts", "roles", "tasks"}.intersection(self.algorithm.needs)
        if self.rewards is None or self.device_rewards or self.judge is not None or more or self.algorithm.needs_hints:
            return None
        rewards = jax.ShapeDtypeStruct((prompts, group), np.float32)
        return Feedback(rewards, scored=jax.ShapeDtypeStruct(rewards.shape, bool)) if self.skips_unscored else rewards

    @property
    def weights(self) -> np.ndarray:
        """Of the reward functions and the rewards on the device, in the order of `Episodes.by_name`."""
        own = () if self.rewards is None else self.rewards.weights or (1.0,) * len(self.rewards.names)
        return np.array([*own, *(reward.weight for reward in self.device_rewards)], np.float32)

    @property
    def watched(self) -> dict[str, float]:
        """Weights by name of the rewards that are learned from; where a judge is asked, that may be no other."""
        names = () if self.rewards is None else self.rewards.names
        names = (*names, *(reward.name for reward in self.device_rewards))
        return {} if self.judge is not None else dict(zip(names, self.weights.tolist(), strict=True))

    @property
    def _of_roles(self) -> OfRoles | None:
        advantage = getattr(self.algorithm, "advantage", None)
        return advantage if isinstance(advantage, OfRoles) else None
