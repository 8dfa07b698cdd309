/** The keys of the server over its routes: who may connect, and until when. */
import { Api } from './api';

const ROUTE = 'tuft/keys';

/** What is known of a key; the key itself is not kept anywhere. Times are seconds since 1970. */
export interface IKey {
  id: string;
  tenant: string;
  name: string;
  admin: boolean;
  /** Where it comes from: only `issued` ones can be changed here. */
  source: 'issued' | 'configuration' | 'server';
  created: number | null;
  expires: number | null;
  revoked: boolean;
}

/** What a new key is to be good for. `seconds` of null: it does not expire. */
export interface INewKey {
  tenant: string;
  name: string;
  admin: boolean;
  seconds: number | null;
}

/** See the head of the file. All reject with the server's own words. */
export class Keys {
  constructor(private readonly _api: Pick<Api, 'call'>) {}

  /** The keys that are in force, the newest first. */
  async list(): Promise<IKey[]> {
    const { keys } = (await this._api.call('GET', ROUTE)) as { keys: IKey[] };
    return keys
      .filter(({ revoked }) => !revoked)
      .sort((a, b) => (b.created ?? 0) - (a.created ?? 0));
  }

  /** Make a key. The answer is the one chance to see it. */
  async create(asked: INewKey): Promise<string> {
    const { seconds, ...rest } = asked;
    const body = { ...rest, ttl_seconds: seconds };
    const made = (await this._api.call('POST', ROUTE, body)) as { key: string };
    return made.key;
  }

  /** Let a key end in `seconds`, or never. */
  async expire(key: IKey, seconds: number | null): Promise<void> {
    await this._api.call('PUT', `${ROUTE}/${key.id}`, { ttl_seconds: seconds });
  }

  /** End a key now, for good. */
  async revoke(key: IKey): Promise<void> {
    await this._api.call('DELETE', `${ROUTE}/${key.id}`);
  }
}
