/** The form of the playground: the prompt, and how tokens are drawn. */
import * as React from 'react';
import { Segments, Slider, WholeNumber } from './inputs';
import { IPlaygroundProps } from './playgroundstate';

const MOST_TOKENS = 32768;

type Props = Pick<IPlaygroundProps, 'view' | 'onView' | 'trans'>;

/** A message to a chat, or a text to go on with. */
export function Prompt({ view, onView, trans }: Props): JSX.Element {
  const chat = view.mode === 'chat';
  return (
    <>
      <div className="jp-Tuft-controls">
        <h3>{trans.__('Prompt')}</h3>
        <Segments
          label={trans.__('Kind of prompt')}
          words={{ chat: trans.__('Chat'), text: trans.__('Continue text') }}
          value={view.mode}
          onValue={mode => onView({ mode })}
        />
      </div>
      {chat && (
        <input
          className="jp-Tuft-field"
          aria-label={trans.__('System message')}
          placeholder={trans.__('System message (optional)')}
          value={view.system}
          onChange={event => onView({ system: event.target.value })}
        />
      )}
      <textarea
        className="jp-Tuft-field"
        rows={3}
        aria-label={chat ? trans.__('Message') : trans.__('Text to continue')}
        placeholder={
          chat ? trans.__('Ask something…') : trans.__('Begin a text…')
        }
        value={view.prompt}
        onChange={event => onView({ prompt: event.target.value })}
      />
    </>
  );
}

/** Temperature and the like. */
export function Sampling({ view, onView, trans }: Props): JSX.Element {
  return (
    <>
      <Slider
        label={trans.__('Temperature')}
        min={0}
        max={2}
        step={0.05}
        value={view.temperature}
        onValue={temperature => onView({ temperature })}
      />
      <Slider
        label={trans.__('Top p')}
        min={0.05}
        max={1}
        step={0.05}
        value={view.topP}
        onValue={topP => onView({ topP })}
      />
      <WholeNumber
        label={trans.__('Tokens')}
        min={1}
        max={MOST_TOKENS}
        value={view.maxTokens}
        onValue={maxTokens =>
          maxTokens && maxTokens > 0 && onView({ maxTokens })
        }
      />
      <WholeNumber
        label={trans.__('Seed')}
        placeholder={trans.__('random')}
        value={view.seed}
        onValue={seed => onView({ seed })}
      />
    </>
  );
}
