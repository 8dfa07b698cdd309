"""The endpoints of the Tinker API, by family; :class:`tuft_jupyter.wire.api.Api` joins them."""
