"""Room, time and company change no token: the cramped world equals the roomy one."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from expertd_engine.core import StepFailed
from expertd_engine.messages import ExpertMode, Submit
from expertd_engine.step_plan import StepPlan
from support.builders_core import EOS, HashForward, Told, make_core, make_scheduler, make_submit, run_alone


@dataclass(frozen=True)
class Arrival:
    at_step: int
    prompt: list[int]
    max_tokens: int
    min_tokens: int
    priority: int
    mode: ExpertMode
    prompt_logprobs: int | None
    abort_at: int | None
    fails_at: int | None

    def submit(self, sequence_id: int) -> Submit:
        return make_submit(
            sequence_id, self.prompt, priority=self.priority, mode=self.mode, max_tokens=self.max_tokens,
            min_tokens=self.min_tokens, prompt_logprobs=self.prompt_logprobs, stop_token_ids=[3],
        )  # fmt: skip


arrivals = st.lists(
    st.builds(
        Arrival,
        at_step=st.integers(0, 6),
        prompt=st.lists(st.integers(1, 49), min_size=1, max_size=8),
        max_tokens=st.integers(0, 16) | st.just(16),
        min_tokens=st.integers(0, 4),
        priority=st.integers(-2, 2),
        mode=st.sampled_from(["exact", "virtual"]),
        prompt_logprobs=st.sampled_from([None, 0]),
        abort_at=st.none() | st.integers(0, 30),
        fails_at=st.none() | st.integers(0, 30),
    ),
    min_size=2,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(
    arrivals=arrivals,
    spare_blocks=st.integers(0, 3),
    block_tokens=st.integers(1, 5),
    max_sequences=st.integers(2, 5),
    max_step_tokens=st.integers(1, 20),
    mid_step=st.booleans(),
)
def test_room_time_and_company_change_no_token(
    arrivals: list[Arrival],
    spare_blocks: int,
    block_tokens: int,
    max_sequences: int,
    max_step_tokens: int,
    mid_step: bool,
) -> None:
    """The pool holds the longest of the sequences and `spare_blocks` more."""
    longest = max(len(arrival.prompt) + max(arrival.max_tokens - 1, 0) for arrival in arrivals)
    num_blocks = 1 + -(-longest // block_tokens) + spare_blocks
    scheduler = make_scheduler(
        num_blocks=num_blocks, block_tokens=block_tokens, max_sequences=max_sequences, max_step_tokens=max_step_tokens,
        max_model_len=32, ageing_steps=5, max_mode_steps=3,
    )  # fmt: skip
    core = make_core(scheduler, forward := HashForward(block_tokens))
    told, step = Told(), 0

    def abort_due() -> None:
        core.abort([i for i, a in enumerate(arrivals) if a.abort_at == step], step)

    def before(plan: StepPlan) -> None:
        if mid_step:
            abort_due()
        failing = {c.sequence.sequence_id for c in plan.chunks if arrivals[c.sequence.sequence_id].fails_at == step}
        if failing:
            raise StepFailed(failing, "seeded")

    forward.before = before
    while core.has_work or step <= 6:
        assert step < 2000
        for sequence_id, arrival in enumerate(arrivals):
            if arrival.at_step == step:
                core.submit(arrival.submit(sequence_id), step)
        if not mid_step:
            abort_due()
        told.take(core.step(step))
        scheduler.check()
        step += 1

    for plan in forward.plans:
        assert len(plan.chunks) <= max_sequences
        assert 0 < plan.num_tokens <= max_step_tokens
        assert {c.sequence.mode for c in plan.chunks} == {plan.mode}
    for sequence_id, arrival in enumerate(arrivals):
        alone = run_alone(arrival.submit(sequence_id))
        tokens, reason = told.tokens.get(sequence_id, []), told.finished[sequence_id].reason
        if reason in ("abort", "error"):
            assert (arrival.abort_at if reason == "abort" else arrival.fails_at) is not None
            assert tokens == alone.tokens.get(sequence_id, [])[: len(tokens)]
        else:
            assert (tokens, reason) == (alone.tokens.get(sequence_id, []), alone.finished[sequence_id].reason)
            assert told.prompt_logprobs.get(sequence_id) == alone.prompt_logprobs.get(sequence_id)
    assert EOS not in [token_id for tokens in told.tokens.values() for token_id in tokens[:-1]]
