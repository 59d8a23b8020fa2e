"""The config of a run: one frozen tree, a docstring and a unit for every key, Hugging Face names throughout.

Only what one key can say about itself is checked here; what several keys say about each other is in `resolve.py`.
The docstrings are the documentation: `distlm schema` prints them for editors.
"""

from __future__ import annotations

import codecs
import math
import re
import shlex
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
)
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Probability = Annotated[float, Field(gt=0.0, lt=1.0)]
NonEmptyStr = Annotated[str, Field(min_length=1)]


def _text_encoding(name: str) -> str:
    try:
        "".encode(name)  # also refuses codecs that are none of text, such as base64
    except (LookupError, ValueError):
        message = (
            "must be an encoding that Python knows, such as utf-8, utf-16, latin-1, cp1252, gb18030, big5 or cp932"
        )
        raise PydanticCustomError("encoding", message) from None
    return codecs.lookup(name).name


def _num_workers(value: Any) -> Any:
    """What is neither a number of workers nor two of them is refused in words of its own."""
    numbers = value if isinstance(value, list) else [value]
    if not all(isinstance(number, int) and not isinstance(number, bool) and 0 < number < 2**31 for number in numbers):
        message = "must be a whole number above 0, or two of them, [MIN, MAX], for an elastic run"
        raise PydanticCustomError("num_workers", message)
    if isinstance(value, list) and len(value) != 2:
        message = "must be one number, or a list of two, [MIN, MAX], for an elastic run; this list has {length}"
        raise PydanticCustomError("num_workers", message, {"length": len(value)})
    if numbers[0] > numbers[-1]:
        message = "the smaller number comes first: [{max}, {min}]"
        raise PydanticCustomError("num_workers", message, {"min": numbers[0], "max": numbers[-1]})
    return value


_SLURM_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


def slurm_time_s(text: str) -> int:
    """Seconds of a time in one of Slurm's forms: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS. Raises ValueError."""
    if not (match := _SLURM_TIME.fullmatch(text)):
        raise ValueError(text)
    first, second, third = (int(match[name] or 0) for name in ("first", "second", "third"))
    if match["days"]:
        return int(match["days"]) * 86400 + first * 3600 + second * 60 + third
    return first * 3600 + second * 60 + third if match["third"] else first * 60 + second


def _slurm_time(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # minutes
    with suppress(ValueError, TypeError):
        if slurm_time_s(value) > 0:
            return value
    message = "must be a time as sbatch takes it: minutes, HH:MM:SS or D-HH:MM:SS, such as 12:00:00 or 2-00:00:00"
    raise PydanticCustomError("slurm_time", message)


_OWN_DIRECTIVES = {
    "--job-name": "name", "-J": "name", "--nodes": "slurm.nodes", "-N": "slurm.nodes",
    "--partition": "slurm.partition", "-p": "slurm.partition", "--account": "slurm.account", "-A": "slurm.account",
    "--qos": "slurm.qos", "-q": "slurm.qos", "--time": "slurm.time", "-t": "slurm.time",
    "--constraint": "slurm.constraint", "-C": "slurm.constraint", "--exclusive": "slurm.exclusive",
    "--gpus-per-node": "slurm.gpus_per_node", "--gres": "slurm.gpus_per_node",
    "--cpus-per-task": "slurm.cpus_per_node", "-c": "slurm.cpus_per_node", "--mem": "slurm.memory_gib_per_node",
    "--signal": "resources.time_to_save_s", "--requeue": "slurm.max_requeues", "--no-requeue": "slurm.max_requeues",
    "--ntasks": "slurm.nodes", "-n": "slurm.nodes", "--ntasks-per-node": "slurm.nodes",
    "--output": "", "-o": "", "--error": "", "-e": "", "--open-mode": "", "--parsable": "", "--wait": "", "-W": "",
    "--chdir": "", "-D": "", "--wrap": "", "--array": "", "-a": "",
}  # fmt: skip
"""Options of sbatch that follow from keys of the config; empty: that distlm needs as they are."""


_FULL_OPTIONS = ("--gpus", "--mem-per-cpu", "--mem-per-gpu")
"""Options of their own whose names begin, or go on, like one of those."""


def _directive(text: str) -> str:
    try:
        words = shlex.split(text)
    except ValueError:
        words = []
    if not text.startswith("-") or "\n" in text or any(word.startswith("-") for word in words[1:]) or not words:
        raise PydanticCustomError("directive", "must be one option of sbatch, such as --mail-type=END")
    if (own := _own_directive(words[0].partition("=")[0])) is not None:
        key = _OWN_DIRECTIVES[own]
        message = f"is {own}: set {key} for it" if key else f"is {own}, which is set by distlm"
        raise PydanticCustomError("directive", message)
    return text


def _own_directive(option: str) -> str | None:
    """Which of those that distlm sets an option is: sbatch takes beginnings of long ones, and values glued to short
    ones."""
    if not option.startswith("--"):
        return option[:2] if option[:2] in _OWN_DIRECTIVES else None
    if option in _OWN_DIRECTIVES:
        return option
    return None if option in _FULL_OPTIONS else next((own for own in _OWN_DIRECTIVES if own.startswith(option)), None)


def _delimiter(text: str) -> str:
    if len(text) != 1 or text in '\r\n"':
        message = "must be one character, and no quote or line end, such as ';' or \"\\t\" (a tab)"
        raise PydanticCustomError("delimiter", message)
    return text


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused, no silent conversion of types."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class MaskedLMTask(Section):
    """Masked language modelling (BERT): predict tokens that were hidden, chosen anew in every epoch."""

    type: Literal["masked-lm"] = "masked-lm"
    """Name of the task."""
    mlm_probability: Probability = 0.30
    """Share of tokens to predict in training; 0.30 as in MosaicBERT and ModernBERT. 80 % of them become [MASK], 10 % a
    random token, 10 % stay."""
    eval_mlm_probability: Probability = 0.15
    """Share of tokens to predict in evaluation; 0.15 as in BERT, so that results compare across training settings."""
    whole_word_masking: bool = False
    """Hide whole words instead of single tokens; evaluation hides single ones always. A word ends at blanks and
    punctuation; each Chinese or Japanese character is a word."""
    masked_only_head: bool = True
    """Compute the prediction head, the most expensive part of small models, only where a token was hidden. Loss and
    gradients are the same; false: for every token, as transformers does."""


class TextClassificationTask(Section):
    """Tell what a text, or a pair of texts, is: one label, any number of labels, or a number."""

    type: Literal["text-classification"]
    """Name of the task."""
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] = (
        "single_label_classification"
    )
    """What the label column holds: one label; a list of labels; a number. Names as in transformers' configs."""
    labels: Annotated[list[NonEmptyStr], Field(min_length=1)] | None = None
    """Names of the labels, in the order of their ids; null: those of the training data, sorted."""
    label_separator: NonEmptyStr | None = None
    """What stands between several labels in a column of text, such as ";"; null: the column holds lists.
    multi_label_classification only."""
    class_weights: Literal["balanced"] | dict[str, PositiveFloat] | None = None
    """Weight of each label in the loss, by its name, 1 for those not named; balanced: in inverse proportion to how
    often a label is in the training data (as in scikit-learn). null: all the same."""
    label_smoothing_factor: Fraction = 0.0
    """Share of the target that is spread evenly over all labels. single_label_classification only."""


class TokenClassificationTask(Section):
    """Give each word of a text a label: named entities, slots, parts of speech."""

    type: Literal["token-classification"]
    """Name of the task."""
    tag_scheme: Literal["auto", "iob1", "iob2", "bioes", "none"] = "auto"
    """How the labels of the data mark entities of several words. All are converted to iob2 (B-PER, I-PER, O), which is
    what the model learns. none: labels are labels, such as parts of speech. auto: told by the training data."""
    labels: Annotated[list[NonEmptyStr], Field(min_length=1)] | None = None
    """Names of the labels (in iob2, where there is a scheme), in the order of their ids; null: those of the training
    data, sorted."""
    label_all_tokens: bool = False
    """Train all tokens of a word on its label (of B-PER, the further ones on I-PER); false: the first one only. A
    word is always predicted from its first token."""
    context: Literal["row", "document"] = "row"
    """What a word is seen with. row: the words of its row. document: as many consecutive rows of its document as fit
    into a sample (see `document_column`), each ended by a separator."""
    case_feature: bool = False
    """Tell the model, as token types, whether a word is lower, Title, UPPER or miXed case or has digits: what an
    uncased tokenizer drops. Needs a model with token types (BERT and its kin), whose table is enlarged and trained;
    predictions then need the types, too (`distlm predict` makes them)."""
    class_weights: Literal["balanced"] | dict[str, PositiveFloat] | None = None
    """Weight of each label in the loss, by its name, 1 for those not named; balanced: in inverse proportion to how
    often a label is in the training data (as in scikit-learn). null: all the same."""
    label_smoothing_factor: Fraction = 0.0
    """Share of the target that is spread evenly over all labels."""


def _with_type(value: Any) -> Any:
    """A task without a type is the first one, which was the only one once."""
    return {"type": "masked-lm", **value} if isinstance(value, dict) else value


Task = Annotated[
    MaskedLMTask | TextClassificationTask | TokenClassificationTask,
    Field(discriminator="type"),
    BeforeValidator(_with_type),
]


class ModelConfig(Section):
    """The model: a pretrained one (`name_or_path`) or one from scratch (`config`), exactly one of the two."""

    name_or_path: NonEmptyStr | None = None
    """A pretrained model: folder, Hub name, or `run:RUN` or `run:RUN@STEP` for what another run has trained (RUN as in
    `distlm status`; STEP is a number, best or last, and last where it is not given). Of a run that trained an adapter
    it is the model with the adapter merged into it."""
    config: dict[str, Any] | None = None
    """From scratch: `model_type` and any keys of that model's transformers config. `vocab_size` follows the tokenizer
    where it is not given."""
    pad_vocab_to_multiple_of: PositiveInt = 64
    """From scratch, where `vocab_size` is not given: round the tokenizer's number of tokens up to a multiple of this,
    which GPUs multiply faster by (8 or more for Tensor Cores). The additional embeddings stand for no token."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Attention kernel, by transformers' name; null: sdpa where the model has it, else eager."""
    quantization: dict[str, Any] | None = None
    """Load the frozen base of an adapter in fewer bits (QLoRA), by the keys of transformers' BitsAndBytesConfig, such
    as {load_in_4bit: true, bnb_4bit_quant_type: nf4}; needs GPUs and the package bitsandbytes."""


class TrainedTokenizer(Section):
    """A tokenizer trained from the training text."""

    type: Literal["wordpiece", "bpe", "unigram"] = "wordpiece"
    """wordpiece: BERT's, on words and single CJK characters. bpe: RoBERTa's, on bytes, so that no text is unknown.
    unigram: ALBERT's and XLM-R's, on text in NFKC form with blanks as characters."""
    vocab_size: Annotated[int, Field(ge=100, lt=2**31)] = 30_522
    """Number of tokens, special tokens included; bpe needs 261 or more: one for each byte."""
    lowercase: bool = True
    """Lowercase the text and strip accents, as uncased BERT does."""
    max_documents: PositiveInt | None = 100_000
    """Documents to learn the vocabulary from, an equal number of each source; null: all."""


class TokenizerConfig(Section):
    """The tokenizer: an existing one (`name_or_path`) or one trained from the corpus (`train`). Where neither is
    given, a pretrained model's own tokenizer is used."""

    name_or_path: NonEmptyStr | None = None
    """Folder or Hub name of a fast tokenizer."""
    train: TrainedTokenizer | None = None
    """Train a tokenizer from the training text."""


class SourceSettings(Section):
    """What all sources have in common."""

    max_documents: PositiveInt | None = None
    """Read only that many documents; null: all."""
    weight: PositiveFloat | None = None
    """Share of the training samples to draw from this source, relative to the weights of the others; all sources have
    one or none has. null: every sample of every source once per epoch. For training sources only."""


class LabelledSource(SourceSettings):
    """What all sources have in common, and the columns that tasks with labels read beside the text."""

    text_pair_column: NonEmptyStr | None = None
    """Column that holds a second text, for tasks on pairs; null: there is none. For tasks with labels only."""
    label_column: NonEmptyStr | None = None
    """Column that holds the label, or the list of labels; null: `label`. For tasks with labels only."""
    document_column: NonEmptyStr | None = None
    """Column that is the same in consecutive rows of one document, for `context: document`; null: of .conll, the
    -DOCSTART- lines tell; of others, all rows of the source are one document."""


class FilesSource(LabelledSource):
    """Local files: .txt (paragraphs separated by blank lines; for tasks with labels: lines), .jsonl, .csv (fields may
    be quoted), .tsv (a line is a row, quotes are text), .parquet; for tasks with labels also .conll, .bio, .iob, .iob2
    (a line for each word, blank lines between sentences) and .conllu. Tables begin with a header. All but .parquet may
    be compressed: .txt.gz, .jsonl.zst, .csv.bz2, .tsv.xz."""

    source: Literal["files"]
    """Kind of source."""
    paths: Annotated[list[NonEmptyStr], Field(min_length=1)]
    """Files, folders or globs, relative to the current folder."""
    format: Literal["txt", "jsonl", "csv", "tsv", "parquet", "conll", "conllu"] | None = None
    """Format of the files; null: what their suffixes tell."""
    text_column: NonEmptyStr = "text"
    """Key or column that holds the text (not used for .txt)."""
    column_names: Annotated[list[NonEmptyStr], Field(min_length=1)] | None = None
    """Names of all columns in their order, for tables without a header: .csv, .tsv, .txt, .conll. null: the header
    names them; of .conll the first is `text_column` and the last `label_column`; of .conllu: id, form, lemma, upos,
    xpos, feats, head, deprel, deps, misc."""
    delimiter: Annotated[str, AfterValidator(_delimiter)] | None = None
    """Character between the fields of .csv, .tsv and .txt; null: a comma, a tab, and none: a .txt with a delimiter or
    with `column_names` is a table, read as .tsv."""
    encoding: Annotated[NonEmptyStr, AfterValidator(_text_encoding)] = "utf-8"
    """Encoding of the files, by Python's name (not used for .parquet)."""
    encoding_errors: Literal["replace", "strict"] = "replace"
    """What to do about bytes that are not in the encoding. replace: each becomes U+FFFD and the documents are counted
    and reported; more than 10 documents that are more than 1 %, or all, are refused. strict: the first is refused."""


class ParallelSource(LabelledSource):
    """Local files of which line i of each together are row i, for tasks with labels. They may be compressed."""

    source: Literal["parallel"]
    """Kind of source."""
    columns: Annotated[dict[NonEmptyStr, NonEmptyStr], Field(min_length=1)]
    """Names of the columns, each with its file, relative to the current folder: {text: seq.in, label: seq.out}. All
    files have the same number of lines."""
    text_column: NonEmptyStr = "text"
    """Column that holds the text."""
    encoding: Annotated[NonEmptyStr, AfterValidator(_text_encoding)] = "utf-8"
    """Encoding of the files, by Python's name."""
    encoding_errors: Literal["replace", "strict"] = "replace"
    """What to do about bytes that are not in the encoding, as for files."""


class DatasetsSource(LabelledSource):
    """A data set that the library `datasets` loads: from the Hugging Face Hub, a local folder, or files and URLs. Its
    text is copied into the cache first, up to a limit, with its labels where the task has them; other columns are left
    out. Class labels come as their names. Nothing in it is executed."""

    source: Literal["datasets"]
    """Kind of source."""
    path: NonEmptyStr
    """Hub name, local folder, or builder (json, csv, parquet, text, arrow) for `data_files`."""
    name: NonEmptyStr | None = None
    """Configuration of the data set, such as 20231101.en; null: its default."""
    split: NonEmptyStr = "train"
    """Split to read; also a part of it, such as train[:10%] (only with `streaming: false`)."""
    revision: NonEmptyStr | None = None
    """Branch, tag or commit on the Hub; null: the default branch. A run keeps the commit that it began with."""
    data_files: Annotated[list[NonEmptyStr], Field(min_length=1)] | None = None
    """Files, globs or URLs, relative to the data set, or to the current folder for a builder."""
    text_column: NonEmptyStr = "text"
    """Column that holds the text."""
    streaming: bool = True
    """Read without downloading the whole split first."""
    max_gib: PositiveFloat = 50.0
    """Copy at most that much into the cache, in GiB of UTF-8. Reaching it, or `max_documents`, is reported."""


class PythonDocsSource(LabelledSource):
    """Documentation strings of the Python standard library and the installed packages: real English text on every
    machine. The files are parsed, nothing is imported. Its columns are `text` and `package`, the top-level name."""

    source: Literal["python-docs"]
    """Kind of source."""
    packages: Annotated[list[NonEmptyStr], Field(min_length=1)] | None = None
    """Top-level package names; null: the standard library and everything installed."""


Source = Annotated[FilesSource | ParallelSource | DatasetsSource | PythonDocsSource, Field(discriminator="source")]


class DataConfig(Section):
    """The text to train on and how it is cut into samples."""

    train: Annotated[list[Source], Field(min_length=1)]
    """Sources of training text, used together."""
    validation: list[Source] = []
    """Sources of held-out text; empty: `validation_fraction` of the training documents is held out."""
    validation_fraction: Fraction = Field(default_factory=lambda data: 0.0 if data.get("validation") else 0.01)
    """Share of the training documents held out for evaluation where `validation` is empty, by default 0.01; 0: none,
    and no evaluation."""
    max_seq_length: Annotated[int, Field(ge=8, lt=2**31)] = 128
    """Tokens in a sample at most, special tokens included. masked-lm packs documents, so that samples are full;
    text-classification cuts longer texts; token-classification divides them."""
    num_proc: PositiveInt | None = None
    """Processes that tokenize; null: one per core of the node that prepares the data. The result does not depend on
    it. May change on resume."""


class TrainingConfig(Section):
    """The optimization. Names and meanings are those of transformers' TrainingArguments where it has them."""

    max_steps: PositiveInt | None = None
    """Optimizer steps to train in all. Exactly one of `max_steps` and `num_train_epochs` is given."""
    num_train_epochs: PositiveFloat | None = None
    """Passes over the training samples."""
    global_train_batch_size: PositiveInt = 256
    """Samples per optimizer step over all workers; constant, whatever the number of workers."""
    per_device_train_batch_size: PositiveInt = 8
    """Samples per forward pass on one worker (the micro batch). The gradient accumulation steps follow:
    global_train_batch_size / (per_device_train_batch_size x workers)."""
    per_device_train_batch_tokens: PositiveInt | None = None
    """Tokens per forward pass on one worker at most, padding included: a micro batch of long samples is divided
    further. null: no limit."""
    group_by_length: bool = True
    """Form batches of samples of like lengths, so that little is padded. Every sample still comes once per epoch.
    Without effect on masked-lm, whose samples are all of one length."""
    per_device_eval_batch_size: PositiveInt = 16
    """Samples per forward pass on one worker in evaluation."""
    learning_rate: PositiveFloat = 5e-4
    """Highest learning rate of the schedule."""
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_min_lr",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = "linear"
    """Shape of the learning-rate schedule, by transformers' name."""
    lr_scheduler_kwargs: dict[str, float] = {}
    """Further arguments of the schedule, by transformers' name, such as min_lr_rate, power or num_decay_steps."""
    warmup_steps: NonNegativeFloat = Field(
        default_factory=lambda data: 0.0 if data.get("lr_scheduler_type") == "constant" else 0.06
    )
    """Steps of linear warm-up; below 1: a share of all steps. By default 0.06, and 0 for the schedule constant."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay (AdamW); not applied to biases and norms."""
    adam_beta1: Fraction = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: Fraction = 0.98
    """AdamW's decay of the second moment."""
    adam_epsilon: PositiveFloat = 1e-6
    """AdamW's epsilon."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this; 0: no clipping."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    """Precision of the computation: `no` is fp32; fp16 needs GPUs. Weights and optimizer state are fp32 always."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    torch_compile: bool = False
    """Compile the encoder with torch.compile; needs a C++ compiler, ZeRO stage 0, 1 or 2, and minutes at the first
    step."""
    on_nonfinite_loss: Literal["stop"] = "stop"
    """What to do when the loss becomes NaN or infinite; `stop` fails the run before such a state is saved."""
    logging_steps: PositiveInt = 10
    """Steps between two points of the training metrics."""
    eval_steps: PositiveInt | None = None
    """Steps between two evaluations; null: at the end only."""
    max_eval_samples: PositiveInt | None = None
    """Evaluate on at most that many samples; null: all held-out samples."""
    save_steps: PositiveInt | None = 500
    """Steps between two checkpoints; null: at the end only. One is always saved at the end."""
    save_total_limit: PositiveInt | None = 2
    """Checkpoints to keep, newest first; null: all. The best one by `metric_for_best_model` is kept beside them."""
    metric_for_best_model: NonEmptyStr = "loss"
    """Metric of the evaluation that tells the best checkpoint, among those whose step was evaluated: loss, accuracy, f1
    or another one of the task's."""
    early_stopping_patience: PositiveInt | None = None
    """End the training when `metric_for_best_model` was no better in that many evaluations, one after the other; null:
    train all steps."""
    early_stopping_threshold: NonNegativeFloat = 0.0
    """By how much the metric must be better to count as better."""
    load_best_model_at_end: bool = Field(default_factory=lambda data: data.get("early_stopping_patience") is not None)
    """Make the final model of the best checkpoint, and save one whenever an evaluation was the best so far; false: of
    the last checkpoint. By default true where `early_stopping_patience` is given."""
    async_save: bool = True
    """Write checkpoints in the background, from a copy of the state in host memory (12 bytes per parameter, divided by
    the workers); false: training waits until each is written, as it does in any case where only the end is saved."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be saved (full disk, no permission): fail the run at once, or warn and try again at the
    next `save_steps`. Earlier checkpoints stay; without one at the end the run fails in any case."""


class DeepSpeedSettings(Section):
    """What is sharded over the workers, by Accelerate's names."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """0: nothing is sharded; 1: optimizer state; 2: and gradients; 3: and weights. May change on resume."""
    offload_optimizer_device: Literal["none", "cpu"] = "none"
    """Where optimizer state lives; `cpu` needs stage 1 or higher and a C++ compiler."""
    offload_param_device: Literal["none", "cpu"] = "none"
    """Where sharded weights live between uses; `cpu` needs stage 3."""


_NETWORK_VARIABLES = ("NCCL_", "GLOO_", "UCX_", "FI_")


def _network_env(variables: dict[str, str]) -> dict[str, str]:
    for name in variables:
        if not name.startswith(_NETWORK_VARIABLES):
            message = "{name} is none of communication: allowed are names that begin with NCCL_, GLOO_, UCX_ or FI_"
            raise PydanticCustomError("network_env", message, {"name": name})
    return variables


class ResourcesConfig(Section):
    """Where an attempt runs and on how much. May differ between the attempts of one run."""

    target: Literal["local", "ray", "slurm", "kubernetes"] = "local"
    """Where to run. local: this machine, or as a driver on the Ray cluster that RAY_ADDRESS names, of which this is a
    node; ray: a job of another Ray cluster, see `ray`; slurm: a job of the cluster whose login node this is, see
    `slurm`; kubernetes: pods with a Ray of their own, see `kubernetes`. `--target` on the command line sets it, too."""
    num_workers: Annotated[
        PositiveInt | Annotated[list[PositiveInt], Field(min_length=2, max_length=2)], BeforeValidator(_num_workers)
    ] = 1
    """Training processes, one per device. [MIN, MAX]: an elastic run, which goes on with as many as the cluster has
    room for while nodes leave and come; on this machine alone it is as many as fit. Numbers that do not divide the
    micro batches of a step are left out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What a worker computes on; auto: GPUs where there are any."""
    cpus_per_worker: PositiveInt | None = None
    """CPU cores (and threads) per worker; null: an equal share of the cores of the machine or cluster, but 1 with GPUs
    of a cluster, and 1 in an elastic run on a cluster, whose cores come and go."""
    network_interface: NonEmptyStr | None = None
    """Network interface by which workers talk to each other, such as ib0: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME.
    null: what these say, else the one with the address that Ray knows the node by."""
    network_env: Annotated[dict[NonEmptyStr, str], AfterValidator(_network_env)] = {}
    """Further environment variables of communication, by names that begin with NCCL_, GLOO_, UCX_ or FI_, such
    as {NCCL_IB_HCA: mlx5}."""
    time_limit_s: PositiveFloat | None = None
    """The attempt ends by itself before it has lasted that many seconds, in time to be saved, as preempted (exit code
    75); null: no limit. Counted from the start of the controller, which is later than that of a batch job."""
    time_to_save_s: PositiveFloat = 60.0
    """How many seconds before `time_limit_s` the workers are asked to finish their step and save. What is not saved at
    the limit is lost, and the newest checkpoint is continued."""

    @property
    def communication(self) -> dict[str, str]:
        """The environment variables of the workers' communication."""
        by_interface = dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), self.network_interface)
        return {**{name: value for name, value in by_interface.items() if value}, **self.network_env}

    @property
    def min_workers(self) -> int:
        """The fewest workers that the run may go on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that the run may go on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    def workers_per_host(self, num_hosts: int) -> int:
        """The most workers that one of so many hosts gets."""
        return math.ceil(self.max_workers / num_hosts)

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers follows the nodes that there are."""
        return isinstance(self.num_workers, list)

    @property
    def world_size(self) -> int:
        """The number of workers, where it is one. Raises TypeError for a range: see `resolve.at_world_size`."""
        if isinstance(self.num_workers, int):
            return self.num_workers
        raise TypeError(f"num_workers = {self.num_workers} is no world size; choose one with at_world_size")


_OWN_RUNTIME_ENV = ("working_dir", "worker_process_setup_hook")


def _runtime_env(value: dict[str, Any]) -> dict[str, Any]:
    if refused := [key for key in _OWN_RUNTIME_ENV if key in value]:
        message = "{key} has no use here: data, models and runs_dir are read where the cluster has them"
        raise PydanticCustomError("runtime_env", message, {"key": refused[0]})
    return value


class RayConfig(Section):
    """The job, where `resources.target` is ray: of the Jobs API of an existing Ray cluster. May change on resume."""

    address: NonEmptyStr | None = None
    """Of the Jobs API (the dashboard), such as http://head:8265; null: RAY_ADDRESS. `--address` on the command line
    sets it, too. Where the cluster asks for a token, it is that of RAY_AUTH_TOKEN, with RAY_AUTH_MODE=token."""
    code: Literal["installed", "carried"] = "installed"
    """installed: the cluster has distlm, in this version. carried: the distlm of this machine is sent along, and the
    cluster has the packages that it needs, or gets them by `runtime_env`."""
    runtime_env: Annotated[dict[str, Any], AfterValidator(_runtime_env)] = {}
    """Ray's runtime environment for the job, by Ray's keys, such as {pip: [...]}, {conda: ...} or {image_uri: ...}."""
    python: NonEmptyStr = "python"
    """How Python is called on the cluster's head node."""


class SlurmConfig(Section):
    """The job, where `resources.target` is slurm: one Ray node on each of its nodes. What is not given here is left to
    the cluster's defaults. May change on resume."""

    partition: NonEmptyStr | None = None
    """Partition, or several by commas."""
    account: NonEmptyStr | None = None
    """Account to charge."""
    qos: NonEmptyStr | None = None
    """Quality of service."""
    nodes: PositiveInt = 1
    """Nodes; the workers are spread over them."""
    cpus_per_node: PositiveInt | None = None
    """CPUs on each node; null: `resources.cpus_per_worker` (or 1) for each of its workers, or with `exclusive` all."""
    gpus_per_node: NonNegativeInt = 0
    """GPUs on each node."""
    memory_gib_per_node: NonNegativeFloat | None = None
    """Memory on each node in GiB; 0: all; null: the cluster's default, which may be little."""
    time: Annotated[str, BeforeValidator(_slurm_time)] | None = None
    """Time limit, such as 12:00:00 or 2-00:00:00. `resources.time_to_save_s` before it (Slurm may be up to a minute
    early) the workers save, and the job goes back into the queue; null: the partition's limit."""
    max_requeues: NonNegativeInt = 20
    """How often a job may begin again, after its time limit or the loss of a node, to go on with its run. One that
    saved no step in its time twice does not go back."""
    constraint: NonEmptyStr | None = None
    """Features that nodes must have."""
    exclusive: bool = False
    """Nodes for this job alone."""
    directives: list[Annotated[str, AfterValidator(_directive)]] = []
    """Further options of sbatch, such as --mail-type=END or --reservation=NAME."""
    prologue: str | None = None
    """Lines of bash that make `python` the one that distlm is installed for, such as `module load cuda` and `source
    .venv/bin/activate`; they run on the first node, in the folder that the job was submitted from, and the others get
    its environment. null: the Python that submits, by its path."""


_KUBERNETES_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def _kubernetes_name(text: str) -> str:
    if not _KUBERNETES_NAME.fullmatch(text):
        message = "must be a name as Kubernetes takes it: at most 63 lower-case letters, digits and '-'"
        raise PydanticCustomError("kubernetes_name", message)
    return text


KubernetesName = Annotated[str, AfterValidator(_kubernetes_name)]


def _absolute_path(text: str) -> str:
    path = PurePosixPath(text)
    if not path.is_absolute() or ".." in path.parts or path == PurePosixPath("/"):
        raise PydanticCustomError("absolute_path", "must be the absolute path of a folder, such as /storage")
    return str(path)


def _environment(variables: dict[str, str]) -> dict[str, str]:
    for name in variables:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            message = "{name} is no name of an environment variable"
            raise PydanticCustomError("environment", message, {"name": name})
    return variables


def _pod_template(value: dict[str, Any]) -> dict[str, Any]:
    if refused := sorted(set(value) - {"metadata", "spec"}):
        message = "{key} is no key of a pod template; allowed: metadata, spec"
        raise PydanticCustomError("pod_template", message, {"key": refused[0]})
    return value


PodTemplate = Annotated[dict[str, Any], AfterValidator(_pod_template)]


class PodResources(Section):
    """What each pod of a kind has; it may use that much and is promised as much."""

    cpus: PositiveInt = 2
    """CPUs."""
    memory_gib: PositiveFloat = 4.0
    """Memory in GiB, that of /dev/shm included."""
    shared_memory_gib: PositiveFloat = 1.0
    """Size of /dev/shm in GiB, for Ray, and for NCCL where a pod has several GPUs."""


class WorkerPodResources(PodResources):
    """What each pod with workers has; it may use that much and is promised as much."""

    gpus: NonNegativeInt = 0
    """GPUs."""
    gpu_resource: NonEmptyStr = "nvidia.com/gpu"
    """Kubernetes' name for them."""


class KubernetesStorage(Section):
    """The storage that all pods share, by a PersistentVolumeClaim that many nodes can write to (ReadWriteMany)."""

    claim: KubernetesName = "distlm-storage"
    """Name of the claim, in the namespace of the run."""
    mount_path: Annotated[str, AfterValidator(_absolute_path)] = "/storage"
    """Where it is in the pods. Relative paths of the config (`runs_dir`, data, models) are seen from there."""


class KubernetesConfig(Section):
    """The pods, where `resources.target` is kubernetes: a RayJob of KubeRay, with a Ray of its own on a head pod, where
    the controller runs, and pods with workers. May change on resume."""

    context: NonEmptyStr | None = None
    """Context of the kubeconfig; null: the current one, or, where there is none, that of the pod this is."""
    namespace: KubernetesName | None = None
    """Namespace; null: that of the context."""
    image: NonEmptyStr | None = None
    """Container image with distlm, by tag or digest: k8s/Dockerfile makes one."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When nodes fetch the image; null: as the cluster does."""
    image_pull_secrets: list[KubernetesName] = []
    """Secrets of the namespace with the credentials of the image's registry."""
    service_account: KubernetesName | None = None
    """Service account of the pods, which need no rights and get no token; null: the namespace's own."""
    worker_pods: PositiveInt = 1
    """Pods with workers; the workers are spread over them."""
    head: PodResources = PodResources()
    """The pod of the controller, which prepares the data, too."""
    worker: WorkerPodResources = WorkerPodResources()
    """The pods of the workers."""
    storage: KubernetesStorage = KubernetesStorage()
    """Shared storage."""
    env: Annotated[dict[str, str], AfterValidator(_environment)] = {}
    """Environment variables of the pods that are no secrets, such as {MLFLOW_TRACKING_URI: http://mlflow:5000}."""
    env_secret: KubernetesName | None = None
    """A Secret of the namespace with the values of the variables that are named under `env` at the top; null:
    `distlm submit` makes one for the run, with the values that they have where it is called."""
    node_selector: dict[str, str] = {}
    """Labels that the nodes of the worker pods must have."""
    tolerations: list[dict[str, Any]] = []
    """Taints of nodes that the worker pods tolerate, by Kubernetes' keys. That of `worker.gpu_resource` is tolerated
    where they have GPUs."""
    priority_class: NonEmptyStr | None = None
    """Priority class of the pods."""
    queue: NonEmptyStr | None = None
    """LocalQueue of Kueue in which the run waits for its turn."""
    suspend: bool = False
    """Begin with nothing but the description of the run; it starts when its RayJob's `suspend` is set to false."""
    max_retries: NonNegativeInt = 3
    """How often the run may go on with a new Ray and new pods, after its head pod was lost or it was preempted; and how
    many starts in a row may save no step. KubeRay retries every failure: of a training that has failed for good, the
    job on the new pods ends at once."""
    active_deadline_s: PositiveInt | None = None
    """Seconds after which KubeRay ends it, counted from when it begins to make pods; null: never. It is not tried
    again."""
    ttl_s: NonNegativeInt = 30
    """Seconds that the pods are kept after the end."""
    network_policy: bool = True
    """Let only the run's own pods and KubeRay's operator connect to its pods."""
    pod_template: PodTemplate = {}
    """Merged into the templates of all pods, by Kubernetes' keys; lists of named things are merged by their names. The
    containers are ray-head, ray-worker and ray-job-submitter."""
    head_template: PodTemplate = {}
    """The same for the head pod alone."""
    worker_template: PodTemplate = {}
    """The same for the pods of the workers alone."""


FOREIGN_MAPPINGS: tuple[tuple[str, ...], ...] = (
    *(("kubernetes", name) for name in ("node_selector", "pod_template", "head_template", "worker_template")),
    ("ray", "runtime_env"),
)
"""Keys below which others name things, by names that may have dots."""


class MaxRetries(Section):
    """How many failures of a cause may follow each other without a new checkpoint in between. Each checkpoint that is
    committed gives all tries back, so that a long run is not ended by the sum of its mishaps."""

    node_lost: NonNegativeInt = 10
    """A worker's process or its host is gone: killed, crashed, or the node went down."""
    hang: NonNegativeInt = 3
    """A worker did not go on until a time limit."""
    infrastructure: NonNegativeInt = 5
    """Ray, the network, or the controller failed. Where these are lost themselves, `distlm submit` begins a new
    attempt."""
    out_of_memory: NonNegativeInt = 2
    """Memory ran out. Twice in the same step ends the run."""
    code: NonNegativeInt = 2
    """An exception that nothing else explains. Twice in the same step ends the run."""
    storage: NonNegativeInt = 0
    """A full or broken disk."""


def _for_all_causes(value: Any) -> Any:
    """A number is meant for every cause."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return dict.fromkeys(MaxRetries.model_fields, value) if is_number else value


class RecoveryConfig(Section):
    """What is done when something fails while a run trains: all workers are started anew from the newest checkpoint,
    as long as there are tries. Bad input, a loss that is not a number and what attestation refuses are never tried
    again."""

    max_retries: Annotated[MaxRetries, BeforeValidator(_for_all_causes)] = MaxRetries()
    """Tries by cause; a number stands for all causes: 0 ends a run at its first failure. The first try follows at once,
    further ones after pauses of 1, 2, 4, ... seconds."""
    longest_pause_s: PositiveFloat = 60.0
    """Seconds between two tries at most."""
    step_timeout_s: PositiveFloat | None = None
    """Seconds without progress (a forward and backward pass, a batch of an evaluation, a save) after which workers
    count as hung; null: ten times as long as the longest one took so far, and 30 at least."""
    start_timeout_s: PositiveFloat = 600.0
    """The same while nothing is measured yet: starting, loading, compiling, the first evaluation and the first save."""


class TrackingConfig(Section):
    """Where metrics and the model are recorded besides the run's own folder."""

    report_to: list[Literal["mlflow"]] = ["mlflow"]
    """Trackers; an empty list keeps metrics in the run's folder only."""
    tracking_uri: NonEmptyStr | None = None
    """MLflow tracking URI; null: MLFLOW_TRACKING_URI from the environment, else an embedded store in `runs_dir`."""
    experiment_name: NonEmptyStr = "distlm"
    """MLflow experiment."""
    log_model: bool = True
    """Upload the final model to MLflow."""
    registered_model_name: NonEmptyStr | None = None
    """Register the uploaded model under this name; null: not registered."""
    system_metrics_interval_s: PositiveFloat = 10.0
    """Seconds between two samples of each node's CPU, memory, network and GPU use."""


class ProfileConfig(Section):
    """Where the time of a step goes: data, forward, head, backward, reduction, optimizer, and what is left."""

    steps: Annotated[str, Field(pattern=r"^\s*[1-9][0-9]*\s*(-\s*[1-9][0-9]*\s*)?$")] | PositiveInt | None = None
    """Steps to profile, such as 10-12. Writes step_map.md and one trace per worker to the attempt's folder; these steps
    are slower than others. null: none."""


class RunConfig(Section):
    """One training run."""

    name: NonEmptyStr = "pretrain"
    """Name for people; shown as the MLflow run's name."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Seed of the initial weights, the order of the samples, masking and dropout."""
    task: Task = MaskedLMTask()
    """What is learned."""
    model: ModelConfig
    """The model."""
    peft: dict[str, Any] | None = None
    """Train an adapter instead of all weights: `peft_type` is the method by PEFT's name (lora, adalora, ia3,
    prefix-tuning, ...), the other keys are those of PEFT's config for it, such as r, lora_alpha and target_modules.
    `adapter_name_or_path` begins with an existing adapter (a folder, Hub name or run:RUN@STEP). null, or `peft_type:
    full`: all weights."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer."""
    data: DataConfig
    """The data."""
    training: TrainingConfig
    """The optimization."""
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()
    """Sharding."""
    resources: ResourcesConfig = ResourcesConfig()
    """Machines."""
    ray: RayConfig = RayConfig()
    """The job on a Ray cluster."""
    slurm: SlurmConfig = SlurmConfig()
    """The job under Slurm."""
    kubernetes: KubernetesConfig = KubernetesConfig()
    """The pods on Kubernetes."""
    recovery: RecoveryConfig = RecoveryConfig()
    """Failures."""
    tracking: TrackingConfig = TrackingConfig()
    """Records."""
    profile: ProfileConfig = ProfileConfig()
    """A map of a step."""
    runs_dir: NonEmptyStr = "runs"
    """Folder for runs, caches and the embedded MLflow store; every node must see it under the same path."""
    env: list[NonEmptyStr] = []
    """Names of environment variables to pass on to the workers; their values are never written down."""
