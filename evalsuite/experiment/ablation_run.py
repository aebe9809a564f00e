"""An ablation, done: every arm quantized into a work folder, scored in every setting, and compared.

What is finished is found again in the store: a folder's name holds a hash of everything that its weights
depend on, so a repeated command does what is missing, and only that. An arm that fails is a row with its
reason, and the others go on.
"""

import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from evalsuite.core.errors import EvalError, UsageError
from evalsuite.core.protocol import WindowProtocol
from evalsuite.core.record import CompareResult, PerplexityResult, QuantizeResult
from evalsuite.core.spec import PerplexitySpec, QuantizeSpec, spec_hash
from evalsuite.data.corpora import load_corpus
from evalsuite.data.models import Checkpoint, find_checkpoint
from evalsuite.engines.export import export_bf16
from evalsuite.engines.tokenizer import load_tokenizer
from evalsuite.experiment.ablation import Ablation, Arm, Setting
from evalsuite.experiment.quantized import quantized_folder, slug_of
from evalsuite.measure.perplexity import Progress as ScoringProgress
from evalsuite.quant.recipe import Recipe
from evalsuite.report.experiment import ArmResult, EnginePair, PlannedArm
from evalsuite.run.perplexity import Finished, prepare_text, run_compare, run_perplexity
from evalsuite.run.quantize import Progress as QuantizeProgress
from evalsuite.run.quantize import bits_per_weight, run_quantize, source_plan
from evalsuite.run.resume import finished_comparison, finished_quantization, has_states
from evalsuite.store.runs import RunStore, load_record

BF16_BITS = 16.0


class Watcher(Protocol):
    """Gives every step a display of its own."""

    def scoring(self, step: str) -> ScoringProgress: ...
    def quantizing(self, step: str) -> QuantizeProgress: ...
    def failed(self, step: str, error: EvalError) -> None: ...


@dataclass(frozen=True)
class Part:
    """What became of one setting.

    Attributes:
        rows: one for each arm, in the order of the file.
        scored: the runs of those arms that did not fail, by name.
    """

    setting: Setting
    rows: list[ArmResult] = field(default_factory=list)
    scored: dict[str, Finished] = field(default_factory=dict)


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
    _refused: dict[str, UsageError] = field(default_factory=dict[str, UsageError], init=False)

    @cached_property
    def source(self) -> Checkpoint:
        return find_checkpoint(self.experiment.source)

    @cached_property
    def base(self) -> str:
        """The unquantized model as MODEL: the source, or for GGUF its BF16 copy in the work folder."""
        if self.source.gguf is None:
            return self.experiment.source
        return str(quantized_folder(self.work, self.source, self._fingerprint, "bf16", {}))

    @property
    def _baseline(self) -> Arm:
        return self.experiment.arms[0]

    def plan(self) -> tuple[list[PlannedArm], list[tuple[WindowProtocol, int]]]:
        """The arms, and the number of windows that each will score by each protocol; loads no weights."""
        experiment = self.experiment
        tokenizer, corpus = load_tokenizer(None, self.source), load_corpus(experiment.corpus)
        texts = [
            prepare_text(corpus, tokenizer, self._ppl_spec(self.base, Setting(windows, experiment.engine[0])))
            for windows in experiment.protocols
        ]
        planned = [self._planned(arm) for arm in experiment.arms]
        counts = [len(text.windows) for text in texts]
        return planned, list(zip(experiment.protocols, counts, strict=True))

    def run(self, watcher: Watcher) -> list[Part]:
        """Do what is missing; returns every setting's rows.

        Raises:
            EvalError: the baseline fails in every setting.
        """
        parts = [Part(setting) for setting in self.experiment.settings]
        errors = [self._attempt(part, self._baseline, self._score_baseline, watcher) for part in parts]
        for part, error in zip(parts, errors, strict=True):
            self._tell(part, self._baseline, error, watcher)
        if errors[0] is not None and None not in errors:
            raise errors[0]
        for arm in self.experiment.arms[1:]:
            for part in parts:
                if baseline := part.scored.get(self._baseline.name):
                    error = self._attempt(part, arm, partial(self._score, arm, baseline), watcher)
                    self._tell(part, arm, error, watcher)
                else:
                    failed = f"{self._baseline.name} has no result to compare with"
                    part.rows.append(ArmResult(arm.name, part.setting.engine, failed=failed))
            if not self.experiment.keep:
                shutil.rmtree(self._folder(arm), ignore_errors=True)
        if not self.experiment.keep and self.base != self.experiment.source:
            shutil.rmtree(self.base, ignore_errors=True)
        return parts

    def compare_engines(self, parts: Sequence[Part], watcher: Watcher) -> list[EnginePair]:
        """Every arm through one engine against the same arm through the other, under one protocol.

        Args:
            parts: two settings that differ in nothing but the engine.
        """
        first, second = parts
        pairs: list[EnginePair] = []
        for arm, *rows in zip(self.experiment.arms, first.rows, second.rows, strict=True):
            compared, failed = None, " ".join(f"{r.engine}: {r.failed}" for r in rows if r.failed)
            if not failed:
                step = f"{arm.name}, {first.setting.protocol.name}: comparing the engines"
                try:
                    compared = self._compared(first.scored[arm.name], second.scored[arm.name], watcher, step)
                except EvalError as error:
                    watcher.failed(step, error)
                    failed = _reason(error)
            pairs.append(EnginePair(arm.name, rows[0].perplexity, rows[1].perplexity, compared, failed))
        return pairs

    def _compared(self, first: Finished, second: Finished, watcher: Watcher, step: str) -> CompareResult:
        """Found again also without a divergence, where the states that one needs are gone."""
        states = has_states(first) and has_states(second)
        found = finished_comparison(self.store, first, second, divergence=states) or run_compare(
            first.path, second.path, self.store, watcher.scoring(step), self.experiment.device
        )
        assert isinstance(found.record.results, CompareResult)
        return found.record.results

    def _attempt(
        self, part: Part, arm: Arm, score: Callable[[Part, Watcher], ArmResult], watcher: Watcher
    ) -> EvalError | None:
        """Add an arm's row to a part, whatever becomes of it."""
        try:
            part.rows.append(score(part, watcher))
        except EvalError as error:
            part.rows.append(ArmResult(arm.name, part.setting.engine, failed=_reason(error)))
            # its frames hold the model that failed, and the next one needs the memory
            error.__traceback__ = error.__cause__ = error.__context__ = None
            gc.collect()
            return error
        return None

    def _tell(self, part: Part, arm: Arm, error: EvalError | None, watcher: Watcher) -> None:
        if error is not None:
            watcher.failed(self._step(arm, part.setting), error)

    def _score(self, arm: Arm, baseline: Finished, part: Part, watcher: Watcher) -> ArmResult:
        setting, folder = part.setting, self._folder(arm)
        quantized, scored, compared = self._find_done(arm, setting, baseline)
        if quantized is None or scored is None or compared is None:
            scored = next(filter(has_states, self._all_scored(str(folder), setting)), None)
            if quantized is None or scored is None:
                quantized = self._quantize(arm, watcher)
            if scored is None:
                step = watcher.scoring(f"{self._step(arm, setting)}: scoring")
                scored = (self.score or run_perplexity)(
                    self._ppl_spec(str(folder), setting), self.store, step
                )
            step = watcher.scoring(f"{self._step(arm, setting)}: comparing")
            compared = run_compare(baseline.path, scored.path, self.store, step, self.experiment.device)
        result = compared.record.results
        assert isinstance(result, CompareResult)
        part.scored[arm.name] = scored
        return ArmResult(
            arm.name, setting.engine, quantized.code_bits_per_weight, _perplexity(scored), result, quantized
        )

    def _score_baseline(self, part: Part, watcher: Watcher) -> ArmResult:
        scored = self._baseline_run(part.setting, watcher)
        part.scored[self._baseline.name] = scored
        return ArmResult(self._baseline.name, part.setting.engine, BF16_BITS, _perplexity(scored))

    def _baseline_run(self, setting: Setting, watcher: Watcher) -> Finished:
        """With the hidden states, unless nothing needs them any more."""
        for found in self._all_scored(self.base, setting):
            if has_states(found) or all(
                self._is_done(arm, setting, found) for arm in self.experiment.arms[1:]
            ):
                return found
        self._copy_source(watcher)
        return (self.score or run_perplexity)(
            self._ppl_spec(self.base, setting),
            self.store,
            watcher.scoring(f"{self._step(self._baseline, setting)}: scoring"),
        )

    def _step(self, arm: Arm, setting: Setting) -> str:
        return arm.name if len(self.experiment.settings) == 1 else f"{arm.name}, {setting}"

    def _quantize(self, arm: Arm, watcher: Watcher) -> QuantizeResult:
        folder, found = self._folder(arm), self._find_quantized(arm)
        if folder.exists() and found:
            return found
        if refused := self._refused.get(arm.name):
            raise refused
        shutil.rmtree(folder, ignore_errors=True)  # ours by its name, and without the record it is no use
        self._copy_source(watcher)
        assert arm.recipe is not None
        step = watcher.quantizing(f"{arm.name}: quantizing")
        try:
            _, record = run_quantize(self._quantize_spec(arm.recipe), folder, self.store, step)
        except UsageError as error:  # of the recipe or the model: it would come again in every setting
            self._refused[arm.name] = error
            raise
        assert isinstance(record.results, QuantizeResult)
        return record.results

    def _copy_source(self, watcher: Watcher) -> None:
        if self.source.gguf is None or Path(self.base).exists():
            return
        watcher.quantizing(f"{self.source.name} is GGUF: writing it as BF16 safetensors")
        self.work.mkdir(parents=True, exist_ok=True)
        export_bf16(self.source, Path(self.base))

    def _planned(self, arm: Arm) -> PlannedArm:
        found = [(setting, self._all_scored(self.base, setting)) for setting in self.experiment.settings]
        if arm.recipe is None:
            # any recipe's plan knows how large its source is as BF16
            size = source_plan(self.source, Recipe(), codes=False).bytes_before if self.source.gguf else 0
            return PlannedArm(arm.name, {}, BF16_BITS, size, all(runs for _, runs in found))
        written = source_plan(self.source, arm.recipe, codes=False)
        codes = source_plan(self.source, arm.recipe, codes=True)
        done = all(any(self._is_done(arm, setting, run) for run in runs) for setting, runs in found)
        return PlannedArm(arm.name, arm.recipe.as_dict(), bits_per_weight(codes), written.bytes_after, done)

    def _is_done(self, arm: Arm, setting: Setting, baseline: Finished) -> bool:
        return None not in self._find_done(arm, setting, baseline)

    def _find_done(
        self, arm: Arm, setting: Setting, baseline: Finished
    ) -> tuple[QuantizeResult | None, Finished | None, Finished | None]:
        """How it was quantized; and its run and comparison, if there are both."""
        quantized = self._find_quantized(arm)
        for scored in self._all_scored(str(self._folder(arm)), setting):
            if compared := finished_comparison(self.store, baseline, scored):
                return quantized, scored, compared
        return quantized, None, None

    def _find_quantized(self, arm: Arm) -> QuantizeResult | None:
        assert arm.recipe is not None
        return finished_quantization(
            self.store, self._quantize_spec(arm.recipe), Path(self.base).name, self._folder(arm).name
        )

    def _all_scored(self, model: str, setting: Setting) -> list[Finished]:
        spec = self._ppl_spec(model, setting)
        slug = Path(model).name if model != self.experiment.source else self.source.slug
        return [Finished(p, load_record(p)) for p in self.store.finished(spec.kind, slug, spec_hash(spec))]

    def _ppl_spec(self, model: str, setting: Setting) -> PerplexitySpec:
        experiment = self.experiment
        share = experiment.gpu_memory_utilization if setting.engine == "vllm" else None
        return PerplexitySpec(
            model=model, engine=setting.engine, corpus=experiment.corpus, protocol=setting.protocol,
            limit=experiment.limit, dtype=experiment.dtype, device=experiment.device, keep_hidden=True,
            gpu_memory_utilization=share,
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


def _reason(error: EvalError) -> str:
    said = f"{error.what.removesuffix('.')}: {error.cause}" if error.cause else error.what
    return " ".join(said.split())
