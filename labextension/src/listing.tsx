/** The first of many things: those that matter now, more of them fifty at a time, and those in which a word occurs. */
import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

/** How many more a click shows: thousands at once would take seconds, and each change of them half of one. */
const PAGE = 50;
/** More than that nobody looks through without a search field. */
const MANY = 20;

/** What a list is of. */
export interface IListed<T> {
  /** In the order in which they are shown. */
  things: readonly T[];
  /** How many are shown at first. */
  first: number;
  /** What is searched for a word. */
  words: (thing: T) => string;
  /** Shown at first wherever they stand. */
  urgent?: (thing: T) => boolean;
  /** What the search field is called. */
  label: string;
  trans: TranslationBundle;
}

/** What is shown of a list, the field that searches it (above), and the buttons for more of it (below). */
export interface IListing<T> {
  visible: readonly T[];
  search: JSX.Element | null;
  more: JSX.Element | null;
}

/** See the head of the file. */
export function useListing<T>(listed: IListed<T>): IListing<T> {
  const { things, first, words, trans } = listed;
  const [count, setCount] = React.useState(first);
  const [word, setWord] = React.useState('');
  const wanted = word.trim().toLowerCase();
  const found = wanted
    ? things.filter(thing => words(thing).toLowerCase().includes(wanted))
    : things;
  const urgent = new Set(
    listed.urgent ? found.filter(listed.urgent).slice(0, PAGE) : []
  );
  let room = Math.max(0, count - urgent.size);
  const visible = found.filter(thing => urgent.has(thing) || room-- > 0);
  const left = found.length - visible.length;
  const search =
    things.length > MANY ? (
      <input
        type="search"
        className="jp-Tuft-field jp-Tuft-search"
        aria-label={listed.label}
        placeholder={listed.label}
        value={word}
        onChange={event => setWord(event.target.value)}
      />
    ) : null;
  const more = (
    <>
      {found.length === 0 && wanted && (
        <p className="jp-Tuft-quiet">
          {trans.__('“%1” is in none of them.', word.trim())}
        </p>
      )}
      {left > 0 && (
        <button
          className="jp-Tuft-textButton"
          onClick={() => setCount(visible.length + PAGE)}
        >
          {left > PAGE
            ? trans.__('Show %1 more of %2', PAGE, found.length)
            : trans.__('Show all %1', found.length)}
        </button>
      )}
      {count > first && (
        <button className="jp-Tuft-textButton" onClick={() => setCount(first)}>
          {trans.__('Show the newest only')}
        </button>
      )}
    </>
  );
  return { visible, search, more };
}
