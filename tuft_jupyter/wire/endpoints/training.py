"""Training: models, passes, steps, saving and loading (protocol sections 2.5 to 2.9)."""

from __future__ import annotations

import msgspec

from tuft_jupyter.core.errors import NotOffered, UserError
from tuft_jupyter.core.loss_graph import Node, checked
from tuft_jupyter.core.loss_names import CUSTOM_LOSS_IS_OFF, check_loss
from tuft_jupyter.core.quotas import Engine, Work
from tuft_jupyter.core.types import CheckpointKind, OpKind
from tuft_jupyter.wire import messages as m
from tuft_jupyter.wire.endpoints.base import Call, Endpoints, Reply, checked_ttl, reply
from tuft_jupyter.wire.peek import peek_forward_backward


class TrainingEndpoints(Endpoints):
    async def create_model(self, call: Call) -> Reply:
        asked = m.decode(m.CreateModel, call.body)
        _adamw_only(asked.optimizer_config)
        lora = msgspec.to_builtins(asked.lora_config)
        request_id = await self.service.runs.create_model(
            call.principal,
            asked.session_id,
            asked.model_seq_id,
            asked.base_model,
            lora,
            asked.user_metadata or {},
            call.body,
        )
        return reply({"request_id": request_id})

    async def get_info(self, call: Call) -> Reply:
        run = self.service.runs.get(call.principal, m.decode(m.ModelOnly, call.body).model_id)
        card = self.service.catalog.resolve(run.base_model)
        return reply(
            {
                "type": "get_info",
                "model_id": run.id,
                "model_name": card.name,
                "is_lora": True,
                "lora_rank": run.lora.get("rank"),
                # A tokenizer_id would be asked for as it is: from a name alone the SDK knows where Llama 3's lies, and
                # that of org/model/variant
                "model_data": {"arch": card.arch, "model_name": card.name},
                "optimizer_config": {"type": "adamw"},
            }
        )

    async def unload_model(self, call: Call) -> Reply:
        model = m.decode(m.ModelOnly, call.body).model_id
        return _promise(await self.service.runs.unload(call.principal, model, call.body), model)

    async def forward(self, call: Call) -> Reply:
        return await self._pass(call, OpKind.FORWARD)

    async def forward_backward(self, call: Call) -> Reply:
        return await self._pass(call, OpKind.FORWARD_BACKWARD)

    async def _pass(self, call: Call, kind: OpKind) -> Reply:
        peek = peek_forward_backward(call.body, call.content_type)
        check_loss(peek.loss_fn, custom_loss=self.service.limits.custom_loss)
        engine = self._engine(call, peek.run)
        self.service.quotas.check_input(call.principal.tenant, peek.tokens, engine)
        await self.service.quotas.pace(call.principal.tenant, 1, peek.tokens, engine)
        request_id = await self.service.runs.forward_backward(
            call.principal,
            peek.run,
            peek.seq,
            peek.tokens,
            call.body,
            call.content_type,
            backward=kind is OpKind.FORWARD_BACKWARD and not peek.forward_only,
        )
        return _promise(request_id, peek.run)

    def _engine(self, call: Call, run: str) -> Engine:
        return Work.TRAINING, self.service.runs.get(call.principal, run).base_model

    async def create_custom_loss(self, call: Call) -> Reply:
        asked = m.decode(m.CreateCustomLoss, call.body)
        session = self.service.sessions.live(call.principal, asked.session_id)
        if not self.service.limits.custom_loss:
            raise NotOffered(CUSTOM_LOSS_IS_OFF)
        graph = checked(
            [(one.name, one.rank) for one in asked.inputs],
            [Node(one.op, one.name, one.target, one.args, one.kwargs) for one in asked.graph.nodes],
        )
        answer = msgspec.json.encode({"loss_id": graph.id, "type": "create_custom_loss"})
        return _promise(self.service.answered(call.principal, session.id, answer), None)

    async def optim_step(self, call: Call) -> Reply:
        asked = m.decode(m.OptimStep, call.body)
        if asked.optimizer_params is not None:
            kind = asked.optimizer_params.get("type")
            raise UserError(
                f"optimizer_params: this run was created with adamw, not {kind!r}: send adam_params"
            )
        adam = (asked.adam_params or m.Adam()).checked()
        engine = self._engine(call, asked.model_id)
        await self.service.quotas.pace(call.principal.tenant, 1, engine=engine)
        request_id = await self.service.runs.optim_step(
            call.principal, asked.model_id, asked.seq_id, adam, call.body
        )
        return _promise(request_id, asked.model_id)

    async def save_weights(self, call: Call) -> Reply:
        asked = m.decode(m.SaveWeights, call.body)
        request_id = await self.service.runs.save_weights(
            call.principal,
            asked.model_id,
            asked.seq_id,
            asked.path or f"{asked.seq_id:06d}",
            CheckpointKind.TRAINING,
            call.body,
            ttl=checked_ttl(asked.ttl_seconds),
            overwrite=asked.overwrite,
            user_metadata=asked.user_metadata,
        )
        return _promise(request_id, asked.model_id)

    async def save_weights_for_sampler(self, call: Call) -> Reply:
        asked = m.decode(m.SaveWeightsForSampler, call.body)
        if asked.path is None and asked.sampling_session_seq_id is not None:
            request_id = await self.service.runs.save_for_sampling_session(
                call.principal, asked.model_id, asked.seq_id, asked.sampling_session_seq_id, call.body
            )
            return _promise(request_id, asked.model_id)
        request_id = await self.service.runs.save_weights(
            call.principal,
            asked.model_id,
            asked.seq_id,
            asked.path or f"{asked.seq_id:06d}",
            CheckpointKind.SAMPLER,
            call.body,
            ttl=checked_ttl(asked.ttl_seconds),
            user_metadata=asked.user_metadata,
        )
        return _promise(request_id, asked.model_id)

    async def load_weights(self, call: Call) -> Reply:
        asked = m.decode(m.LoadWeights, call.body)
        _adamw_only(asked.optimizer_config)
        if asked.model_id is not None:
            request_id = await self.service.runs.load_weights(
                call.principal, asked.model_id, asked.seq_id, asked.path, asked.optimizer, call.body
            )
            return _promise(request_id, asked.model_id)
        if asked.session_id is None or asked.model_seq_id is None:
            raise UserError("load_weights: give model_id, or session_id together with model_seq_id")
        request_id = await self.service.runs.load_new_model(
            call.principal,
            asked.session_id,
            asked.model_seq_id,
            asked.path,
            asked.optimizer,
            asked.user_metadata or {},
            call.body,
        )
        return _promise(request_id, None)


def _promise(request_id: str, model: str | None) -> Reply:
    return reply({"request_id": request_id, "model_id": model} if model else {"request_id": request_id})


def _adamw_only(config: m.OptimizerConfig | None) -> None:
    if config is not None and config.type != "adamw":
        raise UserError(f"optimizer_config.type: {config.type!r} is not offered by this server: use 'adamw'")
