import { TextEncoder } from 'util';

import { IQuestion } from '../complete';
import { IAnswer, listen } from '../listening';

const QUESTION: IQuestion = {
  mode: 'chat',
  system: '',
  prompt: 'Why?',
  temperature: 0,
  topP: 1,
  maxTokens: 8,
  seed: null
};

function said(content: string, finish_reason: string | null = null): unknown {
  return { choices: [{ index: 0, delta: { content }, finish_reason }] };
}

/** What a panel is told in the end, of a server that sends `events`, says that this was all, and hangs up. */
async function heard(...events: unknown[]): Promise<[IAnswer, unknown]> {
  return told(...events.map(event => JSON.stringify(event)), '[DONE]');
}

/** The same, of one that sends just these lines. */
async function told(...lines: string[]): Promise<[IAnswer, unknown]> {
  const sent = lines.map(line => new TextEncoder().encode(`data: ${line}\n\n`));
  const reader = {
    read: async () => ({ done: !sent.length, value: sent.shift() }),
    cancel: async () => undefined
  };
  let asked: unknown;
  let last: IAnswer | null = null;
  await listen(
    async (_, body) => {
      asked = body;
      return { body: { getReader: () => reader } } as unknown as Response;
    },
    'tuft/demo',
    QUESTION,
    new AbortController().signal,
    answer => (last = answer)
  );
  return [last!, asked];
}

describe('an answer that is listened to', () => {
  it('has as many tokens as the server counted, however they were cut', async () => {
    const [answer, asked] = await heard(
      said('Because of '),
      said('Rayleigh.'),
      said('', 'stop'),
      { choices: [], usage: { completion_tokens: 7 } }
    );
    expect(asked).toMatchObject({ stream_options: { include_usage: true } });
    expect(answer).toMatchObject({
      text: 'Because of Rayleigh.',
      tokens: 7,
      state: 'done'
    });
  });

  it('is still cut at the limit when the tokens are counted', async () => {
    const [answer] = await heard(said('Be', 'length'), {
      choices: [],
      usage: { completion_tokens: 8 }
    });
    expect(answer).toMatchObject({ tokens: 8, state: 'cut' });
  });

  it('has failed, and is not done, when the server hangs up before its end', async () => {
    const [answer] = await told(JSON.stringify(said('Because of')));
    expect(answer).toMatchObject({
      text: 'the answer broke off',
      state: 'failed'
    });
  });

  it('counts pieces where nobody counts tokens', async () => {
    const [answer] = await heard(said('a'), said('b', 'stop'));
    expect(answer).toMatchObject({ text: 'ab', tokens: 2, state: 'done' });
  });
});
