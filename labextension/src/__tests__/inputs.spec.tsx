import { ReactWidget } from '@jupyterlab/apputils';
import { MessageLoop } from '@lumino/messaging';
import { Widget } from '@lumino/widgets';
import * as React from 'react';
import { WholeNumber } from '../inputs';

describe('a field for a whole number', () => {
  it('can be emptied to type another one', async () => {
    const given: number[] = [];
    function Form(): JSX.Element {
      const [value, setValue] = React.useState(128);
      const take = (next: number | null) => {
        if (next) {
          given.push(next);
          setValue(next);
        }
      };
      return <WholeNumber label={`${value}`} value={value} onValue={take} />;
    }
    const form = ReactWidget.create(<Form />);
    Widget.attach(form, document.body);
    MessageLoop.flush();
    await form.renderPromise;
    const input = form.node.querySelector('input')!;
    const write = Object.getOwnPropertyDescriptor(
      HTMLInputElement.prototype,
      'value'
    )!.set!;
    const type = async (text: string) => {
      write.call(input, text);
      input.dispatchEvent(new Event('input', { bubbles: true }));
      await Promise.resolve();
    };
    await type('');
    expect(input.value).toBe('');
    await type('6');
    await type('64');
    expect(given).toEqual([6, 64]);
    await type('');
    input.dispatchEvent(new FocusEvent('focusout', { bubbles: true }));
    await Promise.resolve();
    expect(input.value).toBe('64');
    form.dispose();
  });
});
