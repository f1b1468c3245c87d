"""The methods of preference optimisation as one table: the loss of each with its authors' settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from jaxrl_llm.algorithms.preference.objective import PreferenceObjective
from jaxrl_llm.algorithms.preference.pair_losses import (
    AOT,
    CDPO,
    CPO,
    DPO,
    EXO,
    IPO,
    NCA,
    ORPO,
    SPPO,
    APODown,
    APOZero,
    BCOPair,
    DiscoPOP,
    Hinge,
    Mixture,
    RobustDPO,
    SimPO,
    SLiC,
)
from jaxrl_llm.algorithms.preference.unpaired import BCOObjective, KTOObjective


def dpo() -> PreferenceObjective:
    """DPO (Rafailov et al. 2023, 2305.18290): beta 0.1, which is the default of all methods that have one."""
    return PreferenceObjective(DPO())


def reference_free_dpo() -> PreferenceObjective:
    """DPO whose margin leaves the reference out, a switch of the authors' code."""
    return PreferenceObjective(DPO(reference_free=True))


def length_normalized_dpo() -> PreferenceObjective:
    """DPO of log-ratios per token."""
    return PreferenceObjective(DPO(beta=2.0, length_normalized=True))


def f_dpo() -> PreferenceObjective:
    """f-DPO (Wang et al. 2023, 2309.16240) with the Jensen–Shannon divergence."""
    return PreferenceObjective(DPO(f_divergence="js"))


def cdpo() -> PreferenceObjective:
    """Conservative DPO (Mitchell 2023): a tenth of the labels is taken to be wrong."""
    return PreferenceObjective(CDPO(label_smoothing=0.1))


def robust_dpo() -> PreferenceObjective:
    """Robust DPO (Chowdhury et al. 2024, 2403.00409): a tenth of the labels is known to be flipped."""
    return PreferenceObjective(RobustDPO(label_smoothing=0.1))


def ipo() -> PreferenceObjective:
    """IPO (Azar et al. 2023, 2310.12036): a margin of 1 / (2 τ) = 5 between sums over tokens."""
    return PreferenceObjective(IPO())


def hinge() -> PreferenceObjective:
    """The hinge loss of RSO (Liu et al. 2023, 2309.06657)."""
    return PreferenceObjective(Hinge())


def exo() -> PreferenceObjective:
    """EXO (Ji et al. 2024, 2402.00856): the reverse KL."""
    return PreferenceObjective(EXO())


def nca() -> PreferenceObjective:
    """NCA (Chen et al. 2024, 2402.05369): each side against the reference."""
    return PreferenceObjective(NCA())


def aot() -> PreferenceObjective:
    """AOT (Melnyk et al. 2024, 2406.05882): the sorted margins of the whole batch."""
    return PreferenceObjective(AOT())


def aot_unpaired() -> PreferenceObjective:
    """AOT of the sorted rewards of both sides."""
    return PreferenceObjective(AOT(paired=False))


def apo_zero() -> PreferenceObjective:
    """APO-zero (D'Oosterlinck et al. 2024, 2408.06266): for chosen completions better than the policy's."""
    return PreferenceObjective(APOZero())


def apo_down() -> PreferenceObjective:
    """APO-down (D'Oosterlinck et al. 2024, 2408.06266): for chosen completions worse than the policy's."""
    return PreferenceObjective(APODown())


def sppo() -> PreferenceObjective:
    """SPPO (Wu et al. 2024, 2405.00675): η = 1000."""
    return PreferenceObjective(SPPO())


def discopop() -> PreferenceObjective:
    """DiscoPOP (Lu et al. 2024, 2406.08414): beta and τ 0.05."""
    return PreferenceObjective(DiscoPOP())


def bco_pair() -> PreferenceObjective:
    """BCO on pairs (Jung et al. 2024, 2404.04656), without shift."""
    return PreferenceObjective(BCOPair())


def simpo() -> PreferenceObjective:
    """SimPO (Meng et al. 2024, 2405.14734): beta 2, gamma 0.5."""
    return PreferenceObjective(SimPO())


def cpo() -> PreferenceObjective:
    """CPO (Xu et al. 2024, 2401.08417): likelihood of weight 1."""
    return PreferenceObjective(CPO())


def slic() -> PreferenceObjective:
    """SLiC-HF (Zhao et al. 2023, 2305.10425)."""
    return PreferenceObjective(SLiC())


def orpo() -> PreferenceObjective:
    """ORPO (Hong et al. 2024, 2403.07691): λ = 0.1."""
    return PreferenceObjective(ORPO())


def wpo() -> PreferenceObjective:
    """WPO (Zhou et al. 2024, 2406.11827): DPO of pairs weighted as if the policy had written them."""
    return PreferenceObjective(DPO(), weighted=True)


def ld_dpo() -> PreferenceObjective:
    """LD-DPO (Liu et al. 2024, 2409.06411): half of what the longer completion has beyond the shorter one's length."""
    return PreferenceObjective(DPO(), ld_alpha=0.5)


def rpo() -> PreferenceObjective:
    """DPO and the likelihood of the chosen completions (Pang et al. 2024, 2404.19733): weight 1."""
    return PreferenceObjective(DPO(), nll_coef=1.0)


def mpo() -> PreferenceObjective:
    """MPO (Wang et al. 2024, 2411.10442): 0.8 DPO + 0.2 BCO + the likelihood of the chosen completions."""
    return PreferenceObjective(Mixture((DPO(), BCOPair()), (0.8, 0.2)), nll_coef=1.0)


def kto() -> KTOObjective:
    """KTO (Ethayarajh et al. 2024, 2402.01306); see `KTOObjective.balanced` for unequal numbers of labels."""
    return KTOObjective()


def apo_zero_unpaired() -> KTOObjective:
    """APO-zero of single completions."""
    return KTOObjective(variant="apo_zero_unpaired")


def one_sided_dpo() -> KTOObjective:
    """DPO with 0 for the absent side."""
    return KTOObjective(variant="one_sided_dpo")


def kto_other_side() -> KTOObjective:
    """KTO whose baseline is the mean reward of the samples with the other label."""
    return KTOObjective(baseline="other_side")


def bco() -> BCOObjective:
    """BCO of single completions (Jung et al. 2024, 2404.04656), with the batch's mean reward as shift."""
    return BCOObjective()


PAIRED: Mapping[str, Callable[[], PreferenceObjective]] = MappingProxyType(
    {
        preset.__name__: preset
        for preset in (
            *(dpo, reference_free_dpo, length_normalized_dpo, f_dpo, cdpo, robust_dpo, ipo, hinge, exo, discopop),
            *(nca, aot, aot_unpaired, apo_zero, apo_down, sppo, bco_pair, simpo, cpo, slic, orpo),
            *(wpo, ld_dpo, rpo, mpo),
        )
    }
)
"""Presets of pairs by name."""

UNPAIRED: Mapping[str, Callable[[], KTOObjective | BCOObjective]] = MappingProxyType(
    {preset.__name__: preset for preset in (kto, kto_other_side, apo_zero_unpaired, one_sided_dpo, bco)}
)
"""Presets of single labelled completions by name."""
