/** One model's answer as it comes in, piece by piece, with how long it took. Knows nothing of how it is shown. */
import { Ask, complete, IPiece, IQuestion } from './complete';

/** What a model has said so far. */
export interface IAnswer {
  text: string;
  /** Drawn so far: pieces of text, until the server has counted. */
  tokens: number;
  began: number;
  /** Seconds until the first piece, and until now. */
  first: number | null;
  took: number;
  /** `cut`: at the limit of tokens; `failed`: `text` says why. */
  state: 'waiting' | 'writing' | 'done' | 'cut' | 'stopped' | 'failed';
}

/** Collect an answer and tell of it with each piece. Never rejects. */
export async function listen(
  ask: Ask,
  model: string,
  question: IQuestion,
  signal: AbortSignal,
  tell: (answer: IAnswer) => void
): Promise<void> {
  const began = performance.now();
  let answer: IAnswer = {
    text: '',
    tokens: 0,
    began,
    first: null,
    took: 0,
    state: 'waiting'
  };
  const say = (change: Partial<IAnswer>) => {
    answer = { ...answer, took: (performance.now() - began) / 1000, ...change };
    tell(answer);
  };
  say({});
  try {
    for await (const piece of complete(ask, model, question, signal)) {
      say({
        text: answer.text + piece.text,
        tokens: piece.tokens ?? answer.tokens + (piece.text ? 1 : 0),
        first: answer.first ?? (performance.now() - began) / 1000,
        state: state(answer, piece)
      });
    }
    if (answer.state === 'waiting' || answer.state === 'writing') {
      say({ state: 'done' });
    }
  } catch (error) {
    if (signal.aborted) {
      say({ state: 'stopped' });
    } else {
      const reason = error instanceof Error ? error.message : String(error);
      say({ text: reason, state: 'failed' });
    }
  }
}

function state(answer: IAnswer, { finish, tokens }: IPiece): IAnswer['state'] {
  if (tokens !== null) {
    return answer.state; // no more than a number
  }
  if (finish === null) {
    return 'writing';
  }
  return finish === 'length' ? 'cut' : 'done';
}
