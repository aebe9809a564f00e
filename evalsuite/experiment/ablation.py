"""An ablation: several ways to quantize one model, one table.

A baseline and some arms, each quantized into a work folder, scored on the same windows and compared with the
baseline, paired by window. What is finished is found again in the store: a folder's name holds a hash of
everything that its weights depend on, so a repeated command does what is missing, and only that.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

from pydantic import Field, model_validator

from evalsuite.core.protocol import WindowProtocol, protocol
from evalsuite.core.record import CompareResult, PerplexityResult, QuantizeResult
from evalsuite.core.spec import PerplexitySpec, QuantizeSpec, spec_hash
from evalsuite.core.value import Value
from evalsuite.data.corpora import load_corpus
from evalsuite.data.models import Checkpoint, find_checkpoint
from evalsuite.engines.export import export_bf16
from evalsuite.engines.tokenizer import load_tokenizer
from evalsuite.experiment.quantized import RecipeTable, quantized_folder, slug_of
from evalsuite.measure.perplexity import Progress as ScoringProgress
from evalsuite.quant.recipe import Recipe
from evalsuite.report.experiment import ArmResult, PlannedArm
from evalsuite.run.perplexity import Finished, prepare_text, run_compare, run_perplexity
from evalsuite.run.quantize import Progress as QuantizeProgress
from evalsuite.run.quantize import bits_per_weight, run_quantize, source_plan
from evalsuite.run.resume import finished_comparison, finished_quantization, has_states
from evalsuite.store.runs import RunStore, load_record

BF16_BITS = 16.0


class Arm(Value):
    """One row of the table; without a recipe it is the baseline."""

    name: str = Field(min_length=1)
    recipe: RecipeTable | None = None


class Ablation(Value):
    """An experiment file of arms.

    Attributes:
        question: what the table answers; its title.
        source: as MODEL on the command line.
        corpus, protocol, context, stride, limit, dtype, device: as for `hlwq-eval ppl`.
        keep: keep the quantized checkpoints in the work folder.
        arms: the first is the baseline.
    """

    question: str
    source: str
    corpus: str
    protocol: str = "card-1155"
    context: int | None = None
    stride: int | None = None
    limit: int | None = Field(default=None, ge=1)
    dtype: str = "auto"
    device: str = "auto"
    keep: bool = False
    arms: tuple[Arm, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if [arm.recipe is None for arm in self.arms] != [i == 0 for i in range(len(self.arms))]:
            raise ValueError("the first arm is the baseline and has no recipe; every other arm has one")
        names = [slug_of(arm.name) for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError("two arms have the same name")
        return self

    @property
    def windows(self) -> WindowProtocol:
        return protocol(self.protocol).override(self.context, self.stride)


class Watcher(Protocol):
    """Gives every step a display of its own."""

    def scoring(self, step: str) -> ScoringProgress: ...
    def quantizing(self, step: str) -> QuantizeProgress: ...


@dataclass(frozen=True)
class Run:
    """An experiment with its places.

    Attributes:
        score: what scores an arm elsewhere; None scores it here.
    """

    experiment: Ablation
    store: RunStore
    work: Path
    score: Callable[[PerplexitySpec, RunStore, Any], Finished] | None = None

    @cached_property
    def source(self) -> Checkpoint:
        return find_checkpoint(self.experiment.source)

    @cached_property
    def base(self) -> str:
        """The unquantized model as MODEL: the source, or for GGUF its BF16 copy in the work folder."""
        if self.source.gguf is None:
            return self.experiment.source
        return str(quantized_folder(self.work, self.source, self._fingerprint, "bf16", {}))

    def plan(self) -> tuple[list[PlannedArm], int]:
        """The arms, and the number of windows that each will score; loads no weights."""
        experiment = self.experiment
        tokenizer = load_tokenizer(None, self.source)
        text = prepare_text(load_corpus(experiment.corpus), tokenizer, self._ppl_spec(self.base))
        planned = [self._planned(arm) for arm in experiment.arms]
        return planned, len(text.windows)

    def run(self, watcher: Watcher) -> tuple[list[ArmResult], Finished]:
        """Do what is missing; returns every arm's row, and the baseline's run.

        Raises:
            EvalError: see core/errors.py; what is finished is kept, and the same command goes on there.
        """
        baseline = self._baseline_run(watcher)
        first = self.experiment.arms[0]
        rows = [ArmResult(first.name, BF16_BITS, _perplexity(baseline), None, None)]
        for arm in self.experiment.arms[1:]:
            rows.append(self._row(arm, baseline, watcher))
        if not self.experiment.keep and self.base != self.experiment.source:
            shutil.rmtree(self.base, ignore_errors=True)
        return rows, baseline

    def _row(self, arm: Arm, baseline: Finished, watcher: Watcher) -> ArmResult:
        folder = self._folder(arm)
        quantized, scored, compared = self._find_done(arm, baseline)
        if quantized is None or scored is None or compared is None:
            scored = next(filter(has_states, self._all_scored(str(folder))), None)
            if quantized is None or scored is None:
                quantized = self._quantize(arm, watcher)
            if scored is None:
                step = watcher.scoring(f"{arm.name}: scoring")
                scored = (self.score or run_perplexity)(self._ppl_spec(str(folder)), self.store, step)
            step = watcher.scoring(f"{arm.name}: comparing")
            compared = run_compare(baseline.path, scored.path, self.store, step, self.experiment.device)
        if not self.experiment.keep:
            shutil.rmtree(folder, ignore_errors=True)
        result = compared.record.results
        assert isinstance(result, CompareResult)
        return ArmResult(arm.name, quantized.code_bits_per_weight, _perplexity(scored), result, quantized)

    def _baseline_run(self, watcher: Watcher) -> Finished:
        """With the hidden states, unless nothing needs them any more."""
        for found in self._all_scored(self.base):
            if has_states(found) or all(self._is_done(arm, found) for arm in self.experiment.arms[1:]):
                return found
        self._copy_source(watcher)
        name = self.experiment.arms[0].name
        return (self.score or run_perplexity)(
            self._ppl_spec(self.base), self.store, watcher.scoring(f"{name}: scoring")
        )

    def _quantize(self, arm: Arm, watcher: Watcher) -> QuantizeResult:
        folder, found = self._folder(arm), self._find_quantized(arm)
        if folder.exists() and found:
            return found
        shutil.rmtree(folder, ignore_errors=True)  # ours by its name, and without the record it is no use
        self._copy_source(watcher)
        assert arm.recipe is not None
        step = watcher.quantizing(f"{arm.name}: quantizing")
        _, record = run_quantize(self._quantize_spec(arm.recipe), folder, self.store, step)
        assert isinstance(record.results, QuantizeResult)
        return record.results

    def _copy_source(self, watcher: Watcher) -> None:
        if self.source.gguf is None or Path(self.base).exists():
            return
        watcher.quantizing(f"{self.source.name} is GGUF: writing it as BF16 safetensors")
        self.work.mkdir(parents=True, exist_ok=True)
        export_bf16(self.source, Path(self.base))

    def _planned(self, arm: Arm) -> PlannedArm:
        found = self._all_scored(self.base)
        if arm.recipe is None:
            # any recipe's plan knows how large its source is as BF16
            size = source_plan(self.source, Recipe(), codes=False).bytes_before if self.source.gguf else 0
            return PlannedArm(arm.name, {}, BF16_BITS, size, bool(found))
        written = source_plan(self.source, arm.recipe, codes=False)
        codes = source_plan(self.source, arm.recipe, codes=True)
        done = any(self._is_done(arm, baseline) for baseline in found)
        return PlannedArm(arm.name, arm.recipe.as_dict(), bits_per_weight(codes), written.bytes_after, done)

    def _is_done(self, arm: Arm, baseline: Finished) -> bool:
        return None not in self._find_done(arm, baseline)

    def _find_done(
        self, arm: Arm, baseline: Finished
    ) -> tuple[QuantizeResult | None, Finished | None, Finished | None]:
        """How it was quantized; and its run and comparison, if there are both."""
        quantized = self._find_quantized(arm)
        for scored in self._all_scored(str(self._folder(arm))):
            if compared := finished_comparison(self.store, baseline, scored):
                return quantized, scored, compared
        return quantized, None, None

    def _find_quantized(self, arm: Arm) -> QuantizeResult | None:
        assert arm.recipe is not None
        return finished_quantization(
            self.store, self._quantize_spec(arm.recipe), Path(self.base).name, self._folder(arm).name
        )

    def _all_scored(self, model: str) -> list[Finished]:
        spec = self._ppl_spec(model)
        slug = Path(model).name if model != self.experiment.source else self.source.slug
        return [Finished(p, load_record(p)) for p in self.store.finished(spec.kind, slug, spec_hash(spec))]

    def _ppl_spec(self, model: str) -> PerplexitySpec:
        experiment = self.experiment
        return PerplexitySpec.model_validate(
            {
                "model": model, "corpus": experiment.corpus, "protocol": experiment.windows,
                "limit": experiment.limit, "dtype": experiment.dtype, "device": experiment.device,
                "keep_hidden": True,
            }
        )  # fmt: skip

    def _quantize_spec(self, recipe: Recipe) -> QuantizeSpec:
        return QuantizeSpec(source=self.base, recipe=recipe.as_dict(), device=self.experiment.device)

    def _folder(self, arm: Arm) -> Path:
        assert arm.recipe is not None
        return quantized_folder(
            self.work, self.source, self._fingerprint, slug_of(arm.name), arm.recipe.as_dict()
        )

    @cached_property
    def _fingerprint(self) -> str:
        return self.source.fingerprint()


def _perplexity(finished: Finished) -> PerplexityResult:
    assert isinstance(finished.record.results, PerplexityResult)
    return finished.record.results
