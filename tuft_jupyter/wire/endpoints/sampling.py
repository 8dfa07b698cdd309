"""Promises and sampling (protocol sections 2.4 and 2.10)."""

from __future__ import annotations

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.promises import Answer
from tuft_jupyter.core.quotas import Engine, Work
from tuft_jupyter.core.types import PROTOBUF, SAMPLED
from tuft_jupyter.wire import messages as m
from tuft_jupyter.wire.endpoints.base import Call, Endpoints, Reply, reply
from tuft_jupyter.wire.sample_codec import sample_response_as_json

MAX_SAMPLES = 4096
"""Sequences one request may ask for."""


class SamplingEndpoints(Endpoints):
    async def retrieve_future(self, call: Call) -> Reply:
        asked = m.decode(m.RetrieveFuture, call.body)
        answer = await self.service.retrieve(call.principal, asked.request_id, self.hold_seconds)
        if answer is None:
            waiting = {
                "type": "try_again",
                "request_id": asked.request_id,
                "queue_state": self.service.queue_state(call.principal),
                "queue_state_reason": await self.service.queue_reason(call.principal, asked.request_id),
            }
            return reply(waiting, 408)
        return _answer(answer, call)

    async def retrieve_futures(self, call: Call) -> Reply:
        asked = m.decode(m.RetrieveFutures, call.body)
        if asked.target.type != "sampling_session":
            raise UserError(f"target.type: {asked.target.type!r} is not known here: use 'sampling_session'")
        sampler = self.service.sampling.get(call.principal, asked.target.sampling_session_id)
        wait = self.hold_seconds if asked.timeout is None else min(max(asked.timeout, 0.0), self.hold_seconds)
        ended, cursor = await self.service.sampling.completions.after(
            sampler.id, asked.target.cloned_sampler_id, asked.prev_cursor, wait
        )
        completions = [
            {"state": "failed", "request_id": one.request_id}
            if one.size_bytes is None
            else {
                "state": "finished",
                "request_id": one.request_id,
                "response_payload_uncompressed_size": one.size_bytes,
            }
            for one in ended
        ]
        return reply({"completions": completions, "cursor": cursor})

    async def cancel_future(self, call: Call) -> Reply:
        asked = m.decode(m.RequestOnly, call.body)
        await self.service.sampling.cancel(call.principal, asked.request_id)
        return reply({})

    async def create_sampling_session(self, call: Call) -> Reply:
        asked = m.decode(m.CreateSamplingSession, call.body)
        session = self.service.sessions.live(call.principal, asked.session_id)
        checkpoint = None
        if asked.model_path is not None:
            checkpoint = self.service.checkpoints.readable(call.principal, asked.model_path)
            card = self.service.catalog.resolve(checkpoint.base_model)
        elif asked.base_model is not None:
            card = await self.service.card(call.principal, asked.base_model)
        else:
            raise UserError("create_sampling_session: give base_model or model_path")
        sampler = await self.service.sampling.open(
            call.principal, session.id, asked.sampling_session_seq_id, card, checkpoint
        )
        return reply({"sampling_session_id": sampler.id, "type": "create_sampling_session"})

    async def join_sampling_session(self, call: Call) -> Reply:
        asked = m.decode(m.SamplingSessionOnly, call.body)
        client = await self.service.sampling.join(call.principal, asked.sampling_session_id)
        return reply({"type": "join_sampling_session", "client_counter": client})

    async def get_sampler(self, call: Call) -> Reply:
        sampler = self.service.sampling.get(call.principal, call.path["sampler"])
        return reply(
            {"sampler_id": sampler.id, "base_model": sampler.base_model, "model_path": sampler.model_path}
        )

    async def asample(self, call: Call) -> Reply:
        asked = m.decode(m.SampleEnvelope, call.body)
        if not 1 <= asked.num_samples <= MAX_SAMPLES:
            raise UserError(
                f"num_samples: {asked.num_samples} is outside 1..{MAX_SAMPLES}: ask for at least 1, split more"
            )
        sampler, seq = asked.sampling_session_id, asked.seq_id
        engine = (Work.SAMPLING, self.service.sampling.get(call.principal, sampler).base_model)
        await self.service.quotas.pace(
            call.principal.tenant, 1, self._prompt_tokens(call, engine), engine=engine
        )
        request_id = self.service.sampling.submit(call.principal, sampler, seq, call.body)
        sequences = [f"{sampler}:{seq}:{i}" for i in range(asked.num_samples)]
        return reply({"request_id": request_id, "sample_sequence_ids": sequences})

    def _prompt_tokens(self, call: Call, engine: Engine) -> int:
        """Tokens of the prompt, checked; 0 without looking where no limit asks for them."""
        tenant = call.principal.tenant
        if not self.service.quotas.counts_tokens(tenant, engine):
            return 0
        chunks = m.decode(m.SampleSize, call.body).prompt.chunks
        tokens = sum(len(chunk.tokens or ()) for chunk in chunks)
        self.service.quotas.check_input(tenant, tokens, engine)
        return tokens


def _answer(answer: Answer, call: Call) -> Reply:
    """In the form the caller reads. A pass already has it: it is answered in the form in which it was asked."""
    if answer.body is None:
        return reply({"error": answer.error, "category": answer.category})
    if answer.content_type == SAMPLED and not call.accepts(PROTOBUF):
        return Reply(sample_response_as_json(answer.body))
    return Reply(answer.body, content_type=answer.content_type)
