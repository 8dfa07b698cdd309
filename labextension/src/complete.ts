/** Text as a model draws it, from the server's OpenAI-compatible routes. Knows nothing of how it is shown. */

/** How tokens are drawn. A `seed` of null: another one each time. */
export interface ISampling {
  temperature: number;
  topP: number;
  maxTokens: number;
  seed: number | null;
}

/** What a model is to continue: a plain text, or a conversation of which `prompt` is the newest message. */
export interface IQuestion extends ISampling {
  mode: 'chat' | 'text';
  /** What the conversation is under; empty: nothing. */
  system: string;
  prompt: string;
}

/** A piece of an answer, or why it ended, or how many tokens it had in all. */
export interface IPiece {
  text: string;
  finish: string | null;
  /** The server counts when it has ended; a piece may be more than one token, or less. */
  tokens: number | null;
}

/** Asks the server; see `Api.text`. */
export type Ask = (
  route: string,
  body: unknown,
  signal: AbortSignal
) => Promise<Response>;

/** The answer of `model` to `question`, a piece at a time. Rejects with the server's own words. */
export async function* complete(
  ask: Ask,
  model: string,
  question: IQuestion,
  signal: AbortSignal
): AsyncGenerator<IPiece> {
  const shared = {
    model,
    temperature: question.temperature,
    top_p: question.topP,
    max_tokens: question.maxTokens,
    seed: question.seed,
    stream: true,
    stream_options: { include_usage: true }
  };
  const chat = question.mode === 'chat';
  const messages = [
    ...(question.system ? [{ role: 'system', content: question.system }] : []),
    { role: 'user', content: question.prompt }
  ];
  const response = await ask(
    chat ? 'chat/completions' : 'completions',
    chat ? { ...shared, messages } : { ...shared, prompt: question.prompt },
    signal
  );
  for await (const event of events(response)) {
    if (event === '[DONE]') {
      return;
    }
    const { choices, error, usage } = JSON.parse(event);
    if (error) {
      throw new Error(error.message ?? String(error));
    }
    for (const choice of choices ?? []) {
      yield {
        text: choice.delta?.content ?? choice.text ?? '',
        finish: choice.finish_reason ?? null,
        tokens: null
      };
    }
    if (usage) {
      yield { text: '', finish: null, tokens: usage.completion_tokens };
    }
  }
  throw new Error('the answer broke off');
}

/** The data of server-sent events (WHATWG HTML, section 9.2), as they come. */
export async function* events(response: Response): AsyncGenerator<string> {
  const reader = response.body!.getReader();
  const decoder = new TextDecoder();
  let rest = '';
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += decoder.decode(value, { stream: !done });
      const lines = rest.split('\n');
      rest = done ? '' : lines.pop()!;
      for (const line of lines) {
        if (line.startsWith('data: ')) {
          yield line.slice(6).trimEnd();
        }
      }
      if (done) {
        return;
      }
    }
  } finally {
    void reader.cancel();
  }
}
