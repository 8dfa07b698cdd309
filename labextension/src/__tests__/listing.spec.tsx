import { ReactWidget } from '@jupyterlab/apputils';
import { nullTranslator } from '@jupyterlab/translation';
import { MessageLoop } from '@lumino/messaging';
import { Widget } from '@lumino/widgets';
import * as React from 'react';
import { useListing } from '../listing';

/** 119, 118 and so on; the fourth from the end is urgent. */
function Numbers(): JSX.Element {
  const trans = nullTranslator.load('tuft_jupyter');
  const { visible, search, more } = useListing({
    things: [...Array(120).keys()].reverse(),
    first: 5,
    words: number => `Student-${number}`,
    urgent: number => number === 3,
    label: trans.__('Search numbers'),
    trans
  });
  return (
    <>
      {search}
      <ul>
        {visible.map(number => (
          <li key={number}>{number}</li>
        ))}
      </ul>
      {more}
    </>
  );
}

describe('a list of many things', () => {
  let list: ReactWidget;

  beforeEach(async () => {
    list = ReactWidget.create(<Numbers />);
    Widget.attach(list, document.body);
    MessageLoop.flush();
    await list.renderPromise;
  });

  afterEach(() => list.dispose());

  function shown(selector: string): (string | null)[] {
    return [...list.node.querySelectorAll(selector)].map(
      node => node.textContent
    );
  }

  async function press(text: string): Promise<void> {
    [...list.node.querySelectorAll('button')]
      .find(button => button.textContent === text)!
      .click();
    await Promise.resolve();
  }

  async function type(text: string): Promise<void> {
    const search = list.node.querySelector('input')!;
    const { set } = Object.getOwnPropertyDescriptor(
      HTMLInputElement.prototype,
      'value'
    )!;
    set!.call(search, text);
    search.dispatchEvent(new Event('input', { bubbles: true }));
    await Promise.resolve();
  }

  it('begins with the newest and with what is urgent, in their order', () => {
    expect(shown('li')).toEqual(['119', '118', '117', '116', '3']);
  });

  it('grows by fifty, to all of them, and back', async () => {
    await press('Show 50 more of 120');
    expect(shown('li').length).toBe(55);
    await press('Show 50 more of 120');
    expect(shown('li').length).toBe(105);
    await press('Show all 120');
    expect(shown('li').length).toBe(120);
    expect(shown('button')).toEqual(['Show the newest only']);
    await press('Show the newest only');
    expect(shown('li').length).toBe(5);
  });

  it('finds what has a word in it, however it is written', async () => {
    await type(' student-42 ');
    expect(shown('li')).toEqual(['42']);
    await type('nobody');
    expect(shown('li')).toEqual([]);
    expect(shown('p')).toEqual(['“nobody” is in none of them.']);
  });
});
