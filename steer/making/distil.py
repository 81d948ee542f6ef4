"""Matching a model without a context to the same model with it.

    loss = mean over prompts of the mean over answer tokens of KL(teacher with the context || student without it)

Flow:
1. `lessons`: the teacher, the model with the context in front of a prompt, samples an answer, which is read once with
   the context for the distribution of each of its tokens. Those are kept, as float32 log-probabilities of the whole
   vocabulary: 4 bytes * vocabulary * tokens of all answers;
2. a `Student` reads the same answers behind the prompts without the context, and says its own log-probabilities;
3. `descend` moves a few parameters of a student, with Adam at a rate that falls to nothing, and keeps those of its
   checkpoints that do best on prompts set aside for that.

What is compared is what is said about the tokens of an answer, the one that ends it included: the first is said by the
last token of the prompt, and what is said about the prompt's own tokens does not count. Prompts are padded on the left
and answers on the right; padding is attended by nothing and counts nowhere.

Left out: which parameters there are (`steer.making.learn`, `steer.making.soft_prompt`).
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from activations.chat import chat_prompt
from activations.errors import ConfigError, NumericsError
from activations.generate import continuation_ids
from activations.models import LoadedModel
from activations.progress import progress

DIFFERENTIABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""kernels of attention whose gradient is finite at padding, which attends to nothing; that of cuDNN is not"""
CHECKS = 4
"""how often in a training its parameters are tried on the prompts set aside"""


class Lesson(NamedTuple):
    """One prompt, and what the model with the context makes of it."""

    question: str
    taught: list[int]
    """tokens of the prompt with the context"""
    bare: list[int]
    """tokens of the prompt without it"""
    answer: list[int]
    """tokens that the teacher sampled"""
    target: Float[Tensor, "answer vocab"]
    """what the teacher says about each of them, as log-probabilities"""


class Batch(NamedTuple):
    """Prompts, padded on the left, with their answers, padded on the right."""

    ids: Int[Tensor, "row pos"]
    attend: Bool[Tensor, "row pos"]
    places: Int[Tensor, "row pos"]
    """index of each token among the attended ones of its row, -1 for padding"""
    prompt_lengths: list[int]
    answered: Bool[Tensor, "row answer"]
    """True on the tokens of answers"""


Student = Callable[[Batch], Float[Tensor, "row answer vocab"]]
"""log-probabilities of a batch's answers"""


class Settings(NamedTuple):
    """How `descend` goes."""

    steps: int
    batch: int
    lr: float
    seed: int


class Descent(NamedTuple):
    """How a training went."""

    losses: list[float]
    """of each step, on its batch"""
    checks: dict[int, float]
    """step -> loss on the prompts set aside"""
    kept: int
    """the step whose parameters were kept"""
    seconds: float


def lessons(
    loaded: LoadedModel,
    questions: Sequence[str],
    context: str,
    *,
    place: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch: int,
) -> list[Lesson]:
    """Let the model with the context answer questions, in the words of its chat template.

    Args:
      place: `system`, where the context is the system message, or `user`, where it stands in front of each question.
        Without the context, the system message is left to the chat template in either case.
    Raises: ConfigError if a prompt with the context does not fit the model, or the context changes no prompt.
    """
    found = []
    with progress("teacher", len(questions), "prompts") as advance:
        for start in range(0, len(questions), batch):
            some = questions[start : start + batch]
            taught, bare = ([_tokens(loaded, q, c, place) for q in some] for c in (context, None))
            if taught == bare:
                fix = "Write one that the chat template does not write by itself."
                raise ConfigError("context", expected="one that changes the prompt", got=repr(context[:40]), fix=fix)
            limits = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed + start}
            answers = continuation_ids(loaded, taught, **limits)
            with torch.no_grad():
                said = log_probs(loaded, batch_of(loaded, taught, answers)).cpu()
            found += [
                Lesson(*row, target[: len(row[-1])].clone())
                for row, target in zip(zip(some, taught, bare, answers, strict=True), said, strict=True)
            ]
            advance(len(some))
    return found


def _tokens(loaded: LoadedModel, question: str, context: str | None, place: str) -> list[int]:
    if context is not None and place == "user":
        text = chat_prompt(loaded, f"{context}\n\n{question}")
    else:
        text = chat_prompt(loaded, question, system=context)
    return list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])


def batch_of(loaded: LoadedModel, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Batch:
    """One batch of prompts and answers, on the model's device."""
    head, tail = max(map(len, prompts)), max(map(len, answers))
    pad = loaded.tokenizer.pad_token_id or 0
    ids, attend = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        left, right = head - len(prompt), tail - len(answer)
        ids.append([pad] * left + prompt + answer + [pad] * right)
        attend.append([False] * left + [True] * (len(prompt) + len(answer)) + [False] * right)
    mask = torch.tensor(attend, device=loaded.device)
    places = torch.where(mask, mask.long().cumsum(1) - 1, -1)
    lengths = [len(prompt) for prompt in prompts]
    return Batch(torch.tensor(ids, device=loaded.device), mask, places, lengths, mask[:, head:])


def log_probs(
    loaded: LoadedModel, batch: Batch, embeddings: Float[Tensor, "row pos d_model"] | None = None
) -> Float[Tensor, "row answer vocab"]:
    """What the model says about the tokens of the answers.

    Args:
      embeddings: what it reads in place of the ids.
    """
    n_answer = batch.answered.shape[1]
    reads = {"input_ids": batch.ids} if embeddings is None else {"inputs_embeds": embeddings}
    out = loaded.model(
        **reads,
        attention_mask=batch.attend.long(),
        position_ids=batch.places.clamp(min=0),
        use_cache=False,
        logits_to_keep=n_answer + 1,
    )
    return out.logits[:, -n_answer - 1 : -1].float().log_softmax(-1)


def plain(loaded: LoadedModel) -> Student:
    """The model as it is."""
    return lambda batch: log_probs(loaded, batch)


def divergence(
    loaded: LoadedModel, student: Student, some: Sequence[Lesson], *, with_context: bool = False
) -> Float[Tensor, " prompt"]:
    """KL(teacher || student) of each prompt, in nats a token of its answer.

    Args:
      with_context: let the student have the context too.
    """
    prompts = [lesson.taught if with_context else lesson.bare for lesson in some]
    batch = batch_of(loaded, prompts, [lesson.answer for lesson in some])
    target = torch.nn.utils.rnn.pad_sequence([lesson.target for lesson in some], batch_first=True).to(loaded.device)
    kl = functional.kl_div(student(batch), target, log_target=True, reduction="none").sum(-1)
    return torch.where(batch.answered, kl, 0.0).sum(1) / batch.answered.sum(1)


@torch.no_grad()
def divergences(
    loaded: LoadedModel, student: Student, some: Sequence[Lesson], batch: int
) -> Float[np.ndarray, " prompt"]:
    """The same, so many prompts at a time and without gradients."""
    parts = [divergence(loaded, student, some[i : i + batch]) for i in range(0, len(some), batch)]
    return torch.cat(parts).double().cpu().numpy()


def descend(
    what: str,
    loaded: LoadedModel,
    student: Student,
    parameter: Tensor,
    fit: Sequence[Lesson],
    select: Sequence[Lesson],
    settings: Settings,
    bound: Callable[[Tensor], None] = lambda parameter: None,
) -> Descent:
    """Move a parameter of `student` down the loss on `fit`, in place; keep the checkpoint that does best on `select`.

    Args:
      bound: brings the parameter back to where it may be, in place, behind each step.
    Raises: NumericsError if the loss or its gradient is not finite.
    """
    start, generator = time.perf_counter(), np.random.default_rng(settings.seed)
    optimiser = torch.optim.Adam([parameter], lr=settings.lr)
    falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / settings.steps)
    every = max(1, settings.steps // CHECKS)
    losses, checks, best, order = [], {}, (np.inf, 0, parameter.detach().clone()), np.zeros(0, int)
    with progress(what, settings.steps, "steps") as advance:
        for step in range(1, settings.steps + 1):
            if len(order) < settings.batch:
                order = np.concatenate([order, generator.permutation(len(fit))])
            some, order = [fit[i] for i in order[: settings.batch]], order[settings.batch :]
            optimiser.zero_grad()
            with sdpa_kernel(DIFFERENTIABLE):
                loss = divergence(loaded, student, some).mean()
                loss.backward()
            steepness = float(torch.linalg.vector_norm(cast(Tensor, parameter.grad)))
            if not np.isfinite([float(loss.detach()), steepness]).all():
                got, fix = f"{float(loss.detach()):g} and {steepness:g}", "Lower lr."
                raise NumericsError(f"{what}, step {step}", expected="a finite loss and gradient", got=got, fix=fix)
            optimiser.step()
            falling.step()
            with torch.no_grad():
                bound(parameter)
            losses.append(float(loss.detach()))
            if step % every == 0 or step == settings.steps:
                checks[step] = float(divergences(loaded, student, select, settings.batch).mean())
                best = min(best, (checks[step], step, parameter.detach().clone()), key=lambda found: found[0])
            advance(1)
    with torch.no_grad():
        parameter.copy_(best[2])
    return Descent(losses, checks, best[1], time.perf_counter() - start)
